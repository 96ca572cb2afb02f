"""Training is the same with and without the callback, bit for bit, in all common settings."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.utils.data import DataLoader

from tests.lightning_models import IMAGE, SmallClassifier, averaging, fit, samples
from tests.models import checkpointed
from tests.played_runs import open_run
from tests.training import Losses, Setting, assert_same, outcome, train
from vitx.callbacks import RolloutCallback

IMAGES = torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))


class FrozenBlock(SmallClassifier):
    """A module whose first block stays in eval mode, as when only the upper layers are fine-tuned."""

    def __init__(self):
        super().__init__()
        self.vit.blocks[0].requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.vit.blocks[0].eval()
        return self


class FrozenBackbone(SmallClassifier):
    def __init__(self):
        super().__init__()
        self.vit.requires_grad_(False)


class Checkpointed(SmallClassifier):
    def __init__(self):
        super().__init__()
        checkpointed(self.vit)


class CompiledBackbone(SmallClassifier):
    def __init__(self):
        super().__init__()
        del self.vit.blocks[1:]
        self.vit = torch.compile(self.vit, backend="aot_eager")


class Manual(SmallClassifier):
    """A module with manual optimization: one optimizer for the backbone and one for the head."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (self.vit, self.head)]


class LogsInForward(SmallClassifier):
    def forward(self, images):
        self.log("mean", images.mean())
        return super().forward(images)


class Drawing(SmallClassifier):
    """A module with random generators of its own."""

    def __init__(self):
        super().__init__()
        self.drawing, self.scaling = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, images):
        kept = torch.rand(len(images), 1, 1, 1, generator=self.drawing) > 0.3
        return super().forward(images * kept * float(self.scaling.uniform(0.5, 1)))


def compiled() -> pl.LightningModule:
    if torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6 fails to compile this module, with the callback and without")
    module = SmallClassifier()
    del module.vit.blocks[1:]  # one block is compiled sooner
    # inductor would need a C++ compiler and take minutes.
    return torch.compile(module, backend="aot_eager")


class Failing:
    """A target function that fails after the forward pass, in every other firing."""

    def __init__(self):
        self.calls = 0

    def __call__(self, logits):
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("on purpose")
        return logits[:, 0]


EVERY_STEP = {"every_n_steps": 1}
SETTINGS = {
    "every epoch": Setting(),  # the module has dropout, attention dropout, drop path and BatchNorm
    "every step": Setting(callback=EVERY_STEP),
    "faithfulness": Setting(callback=EVERY_STEP | {"faithfulness": True, "num_images": (1, 4)}),
    "accumulating 3 batches": Setting({"accumulate_grad_batches": 3}, EVERY_STEP),
    "labels as targets, one method": Setting(callback={"target": "label", "methods": ["grad_rollout"]}),
    "one image of each class": Setting(callback={"per_class": True}),
    "given images": Setting(callback={"images": IMAGES}),
    "a frozen block in eval mode": Setting(callback=EVERY_STEP, module=FrozenBlock),
    "a frozen backbone": Setting(callback=EVERY_STEP, module=FrozenBackbone),
    "gradient checkpointing": Setting(callback=EVERY_STEP, module=Checkpointed),
    "bf16-mixed": Setting({"precision": "bf16-mixed"}, EVERY_STEP),
    "bf16-true": Setting({"precision": "bf16-true"}, EVERY_STEP),
    "64-true": Setting({"precision": "64-true"}, EVERY_STEP),
    "clipping by norm": Setting({"gradient_clip_val": 0.1}, EVERY_STEP),
    "clipping by value": Setting({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, EVERY_STEP),
    "EMA": Setting(callback=EVERY_STEP, beside=lambda: [averaging(0.5)]),
    "EMA, explained": Setting(callback=EVERY_STEP | {"weights": "ema"}, beside=lambda: [averaging(0.5)]),
    "SWA": Setting(
        {"max_epochs": 3}, EVERY_STEP, beside=lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)]
    ),
    "a compiled module": Setting(callback=EVERY_STEP, module=compiled),
    "a compiled backbone": Setting(callback=EVERY_STEP, module=CompiledBackbone),
    "manual optimization": Setting(callback=EVERY_STEP, module=Manual),
    "generators of its own": Setting(callback=EVERY_STEP, module=Drawing),
    "logging in forward": Setting(callback=EVERY_STEP, module=LogsInForward),
    "val_check_interval": Setting({"val_check_interval": 2}, EVERY_STEP),
    "check_val_every_n_epoch=None": Setting({"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "no validation": Setting(callback={"images": IMAGES}, validation=False),
    "limit_val_batches=0": Setting({"limit_val_batches": 0}, {"images": IMAGES}),
    "fast_dev_run": Setting({"fast_dev_run": True}, EVERY_STEP),
    "loaders with workers": Setting(loader={"num_workers": 1, "persistent_workers": True}),
    "detect_anomaly": Setting({"detect_anomaly": True}, EVERY_STEP),
    "inference_mode=False": Setting({"inference_mode": False}),
    "explanations that fail": Setting(callback=EVERY_STEP | {"target": Failing(), "on_error": "warn"}),
}


@cache
def usual() -> dict[str, torch.Tensor]:
    """Train as most settings do, without a callback."""
    return train(Setting(), Path())


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.filterwarnings("ignore:.*on purpose")
def test_the_training_is_the_same(setting, tmp_path):
    callback = RolloutCallback(**{"on_error": "raise", "num_images": (2, 8)} | setting.callback)
    watched = train(setting, tmp_path / "watched", callback)
    same = replace(setting, callback={}) == Setting()
    plain = usual() if same else train(setting, tmp_path / "plain")
    assert callback.state_dict()["scalars"], "the callback found nothing"
    assert_same(plain, watched)


@pytest.mark.parametrize("trace", ["a random number", "a gradient", "a mode", "a buffer"])
def test_the_comparison_would_notice(trace, tmp_path):
    class Careless(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trace == "a random number":
                torch.rand(1)
            elif trace == "a gradient":
                pl_module.head.weight.grad = torch.ones_like(pl_module.head.weight)
            elif trace == "a mode":
                pl_module.vit.eval()
            else:
                pl_module.norm.running_mean += 1e-6

    setting = Setting({"accumulate_grad_batches": 3})
    with pytest.raises(AssertionError, match="tensors differ: "):
        assert_same(train(setting, tmp_path), train(setting, tmp_path, Careless()))


class Resumable(DataLoader):
    """A loader that resumes in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    start = given = 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.given = number + 1
                yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.start = state["given"]


class Interrupted(pl.Callback):
    """A callback that saves a checkpoint and the random state in the second epoch, or restores that state."""

    def __init__(self, path: Path, generator: torch.Tensor | None = None):
        self.path, self.generator = path, generator

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.generator is not None and trainer.global_step == 6:
            torch.set_rng_state(self.generator)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 6 and self.generator is None:
            self.generator = torch.get_rng_state()
            trainer.save_checkpoint(self.path)


@pytest.mark.skipif(
    pl.__version__.startswith("2.4"), reason="Lightning 2.4 counts a resumed epoch's steps anew"
)
@pytest.mark.parametrize("every", [{"every_n_steps": 1}, {"every_n_epochs": 1}], ids=["steps", "epochs"])
def test_a_run_resumed_in_mid_epoch_equals_the_uninterrupted_one(every, tmp_path):
    def run(interrupted, checkpoint=None):
        losses = Losses()
        callback = RolloutCallback(num_images=(2, 8), on_error="raise", **every)
        loaders = Resumable(samples(16), batch_size=4), DataLoader(samples(8, seed=1), batch_size=4)
        options = {"logger": losses, "max_epochs": 3, "default_root_dir": tmp_path}
        trainer, _ = fit(callback, interrupted, data=loaders, ckpt_path=checkpoint, **options)
        return outcome(trainer, losses), callback.state_dict()

    saves = Interrupted(tmp_path / "middle.ckpt")
    whole, seen = run(saves)
    resumed, seen_again = run(Interrupted(saves.path, saves.generator), saves.path)
    runs = sorted(tmp_path.rglob("run.json"))
    for step in range(6):
        whole.pop(f"loss at step {step}")
    assert_same(whole, resumed)
    assert seen["scalars"] == seen_again["scalars"]
    first, again = ({path.name: path.read_bytes() for path in run.parent.iterdir()} for run in runs)
    for name in ("run.json", "numbers.csv"):  # the run's name, and numbers that Lightning loses on resuming
        del first[name], again[name]
    assert first == again
    numbers, same = (open_run(run.parent).numbers for run in runs)
    assert all(numbers[name] == same[name] for name in numbers if name.startswith("vitx/"))
