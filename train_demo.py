"""Fine-tune a DeiT and show what it looks at, from before the first step to the last.

    python train_demo.py                                     handwritten digits in clutter
    python train_demo.py --config configs/demo.yaml --config configs/shortcut.yaml    one config over another
    python train_demo.py --config configs/deit_tiny_imagefolder.yaml --data.root FOLDER

It writes to `logs/`, and prints at the end where the pictures are and how to open them. The configs are short
and worth reading. Any setting can be overridden, as in `--trainer.max_epochs 3`. The first argument may be
`fit` (the default), `validate`, `test` or `predict`; `python train_demo.py fit --help` lists all settings.
"""

import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ArgumentError, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning_utilities.core import rank_zero
from PIL import Image
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn import functional as F

import vitx
from demo.schedule import warmup_cosine
from demo.tuning import add_lora, load_weights
from vitx.attribution import title_of
from vitx.callbacks.lightning import LightningHost
from vitx.errors import last_line
from vitx.models.checkpoints import create_model
from vitx.pictures import render
from vitx.pictures.captions import captions_of
from vitx.watch import Settings
from vitx.watch.images import Selection

PROJECT = Path(__file__).parent
CONFIGS = PROJECT / "configs"
COMMANDS = ("fit", "validate", "test", "predict")
_ALONE = (
    "the config has settings of a class that it does not name: put it over one that does, as in "
    "--config configs/demo.yaml --config configs/shortcut.yaml"
)


class Classifier(pl.LightningModule):
    """A Vision Transformer of timm that is fine-tuned to classify pictures.

    Args:
        num_classes: number of classes in the data.
        model_name: any Vision Transformer of timm.
        pretrained: start from timm's pretrained weights, which come from the hub.
        weights: a file of weights to start from: .safetensors, .pth or .ckpt. A relative path may also start
            at the folder of this script; a head of another size is left out.
        model_options: further arguments of the model, such as `img_size`.
        learning_rate: learning rate of the head.
        layer_decay: ratio of the learning rates of each layer and the layer above it.
        weight_decay: weight decay of all weights except biases and norms.
        warmup: fraction of the steps in which the learning rate rises.
        label_smoothing: fraction of the target that is spread over all classes.
        lora: arguments of peft's LoraConfig, to train low-rank updates of some layers instead of the layers.
    """

    def __init__(
        self,
        num_classes: int,
        model_name: str = "deit_tiny_patch16_224",
        pretrained: bool = False,
        weights: str | None = None,
        model_options: dict[str, Any] | None = None,
        learning_rate: float = 5e-4,
        layer_decay: float = 0.75,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = create_model(model_name, pretrained, num_classes, model_options or {})
        if weights:
            shipped = PROJECT / weights
            load_weights(self.model, shipped if shipped.is_file() else Path(weights))
        if lora:
            add_lora(self.model, lora)

    @property
    def data_config(self) -> dict[str, Any]:
        """The images that the model expects: size, mean, std, interpolation, crop."""
        return dict(resolve_model_data_config(self.model))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, classes)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch (images, labels, ...)."""
        images, labels = batch[:2]
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self._accuracy(logits, labels))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy; those of a second data set are named `val_clean`."""
        self._evaluate(batch, ("val", "val_clean")[dataloader_idx])

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log loss and accuracy as `validation_step` does."""
        self._evaluate(batch, ("test", "test_clean")[dataloader_idx])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the probabilities, (B, classes)."""
        probabilities: Tensor = self(batch[0]).softmax(-1)
        return probabilities

    def configure_optimizers(self) -> Any:
        """Return AdamW with a learning rate for each layer, and a schedule of warm-up and cosine decay."""
        settings = self.hparams
        optimizer = create_optimizer_v2(
            self.model,
            opt="adamw",
            lr=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            layer_decay=settings["layer_decay"],
        )
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [warmup_cosine(optimizer, int(settings["warmup"] * steps), steps)]

    def _evaluate(self, batch: Any, name: str) -> None:
        images, labels = batch[:2]
        logits = self(images)
        values = {"loss": F.cross_entropy(logits, labels), "accuracy": self._accuracy(logits, labels)}
        options: Any = {"add_dataloader_idx": False, "batch_size": len(labels), "sync_dist": True}
        for key, value in values.items():
            self.log(f"{name}/{key}", value, prog_bar=True, **options)

    def _accuracy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels).float().mean()


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """A formatter that keeps the lines of the description, and the first sentence about each command."""

    def _expand_help(self, action: Any) -> str:
        said: str = super()._expand_help(action)
        # Lightning truncates its own text in the second sentence.
        return said.split(". ")[0] if action.dest in COMMANDS else said


class DemoCLI(LightningCLI):
    """A LightningCLI that takes the number of classes from the data, and ends by printing what to look at."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Take the number of classes from the data."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def after_fit(self) -> None:
        """Explain the best checkpoint, and print where everything is."""
        trainer = self.trainer
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        # Older versions of Lightning do not save linked arguments.
        now = {"num_classes": self.datamodule.num_classes, "pretrained": False, "weights": None}
        module = Classifier.load_from_checkpoint(best, **now) if best else self.model
        picture = explain_after_training(trainer, module, folder)
        if not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val") and name.endswith("accuracy"):
                print(f"{name:<22}{value:.1%}")
        print(f"best checkpoint       {best or 'none was written'}")
        print(f"what it looks at      {picture}")
        print(f"all steps             tensorboard --samples_per_plugin images=100 --logdir {folder}")
        print("                      then open http://localhost:6006/#images and move the slider")
        print(f"on one page           vitx report {folder}")


def explain_after_training(trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> Path | None:
    """Explain eight validation images from Python, and write the picture to the folder."""
    if trainer.val_dataloaders is None:
        return None
    samples = Selection(Settings(), LightningHost(trainer, module)).choose()
    images = samples.images.to(trainer.strategy.root_device)
    module = module.to(images.device)
    found = vitx.explain_methods(module, images, ["rollout", "grad_rollout"])
    explanation = found["rollout"]
    columns = {"input": explanation.pixels()}
    columns |= {title_of(method): each.overlays() for method, each in found.items()}
    captions = captions_of(explanation.logits, samples.labels, samples.class_names)
    path = folder / "after_training.png"
    Image.fromarray(render.grid(columns, captions)).save(path)
    return path


def with_defaults(arguments: list[str]) -> list[str]:
    """Complete the command line: `fit` if no command is given, and the demo if no config is given.

    Example:
        >>> with_defaults(["test"])[:2]
        ['test', '--config']
    """
    if arguments[:1] in (["-h"], ["--help"]):
        return arguments
    # Only the first word can be a command: a later one may be the value of an option.
    command, rest = ("fit", arguments)
    if arguments and arguments[0] in COMMANDS:
        command, *rest = arguments
    if not any(word in ("-c", "--config") or word.startswith("--config=") for word in rest):
        rest = ["--config", str(CONFIGS / "demo.yaml"), *rest]
    return [command, *rest]


def keep_quiet() -> None:
    """Silence Lightning's tips to install more, and warnings that only Lightning itself can act on."""
    warnings.filterwarnings("ignore", message=r"[\s\S]*(LeafSpec|deprecated in v4)")
    rank_zero.log.addFilter(lambda record: "Tip:" not in record.getMessage())


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    keep_quiet()
    sys.argv[1:] = with_defaults(sys.argv[1:] if arguments is None else arguments)
    try:
        DemoCLI(
            Classifier,
            pl.LightningDataModule,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": __doc__, "formatter_class": HelpFormatter, "exit_on_error": False},
        )
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _sentence(error: Exception) -> str | None:
    """Return the message of the VitxError that caused an error, or of a wrong command line; else None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, vitx.VitxError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        if not isinstance(error, ArgumentError):
            return None
        return _ALONE if "Given value: {'init_args'" in str(error) else str(error)
    return last_line(cause)


if __name__ == "__main__":
    main()
