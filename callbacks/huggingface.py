"""The callback for Hugging Face's Trainer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"this callback is for Hugging Face's Trainer ({error}): pip install transformers accelerate",
        name=error.name,
    ) from None

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.watch import Host, Observer
from vitx.watch.calling import unwrapped
from vitx.watch.host import Group
from vitx.watch.loggers import MlflowRun, WandbRun

_STATE = "vitx.pt"  # in the folder of a checkpoint


class RolloutCallback(Observer, TrainerCallback):
    """Log what the model looks at on fixed images, as pictures and numbers, while it trains.

    It fires before the first step, every n epochs or steps, and at the end of the training. The images come
    from the Trainer's `eval_dataset`, through its collator. Pictures (`vitx/maps`) and numbers
    (`vitx/METHOD/...`) go to the Trainer's TensorBoard, Weights & Biases and MLflow runs; without these,
    pictures become PNG files. The numbers are added to the metrics of each evaluation, so that
    `metric_for_best_model="vitx/rollout/entropy"` works. The training is bit for bit the same.

    Args:
        trainer: the Trainer that this callback is added to.
        **options: options of `vitx.watch.Settings`. If `eval_dataset` is a mapping, `dataloader_idx` may be
            one of its names; `on_validate` applies to `trainer.evaluate()` outside of a training.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise VitxError(
                f"RolloutCallback needs the Trainer, found {type(trainer).__name__}: call "
                "trainer.add_callback(RolloutCallback(trainer))"
            )
        super().__init__(**options)
        self._trainer = trainer

    @cached_property
    def _host(self) -> "TrainerHost":
        return TrainerHost(self._trainer)

    def _record_first_step(self) -> None:
        trainer: Any = self._trainer
        own, compute = vars(trainer).get("compute_loss"), trainer.compute_loss

        def recorded(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            del trainer.compute_loss
            if own is not None:
                trainer.compute_loss = own
            with self.record_step(unwrapped(model), inputs, "compute_loss"):
                return compute(model, inputs, *args, **kwargs)

        trainer.compute_loss = recorded

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Show what the model looks at before it is trained; after a resume, continue the run."""
        vars(self).pop("_host", None)  # a new one takes the writers of this training
        self.reset()
        self._record_first_step()
        if state.global_step:
            folders = [str(args.resume_from_checkpoint or ""), str(_checkpoint(args, state))]
            kept = next(filter(Path.is_file, (Path(one, _STATE) for one in folders if one)), None)
            if kept is not None:
                self.load_state_dict(torch.load(kept, weights_only=True))
            self.resume(self._host, state.global_step, state.global_step + 1)
        elif self.at_start:
            self._fire(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Fire after every n-th step."""
        if self.every_n_steps and state.global_step % self.every_n_steps == 0:
            self._fire(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Fire at the end of every n-th epoch, before the model is evaluated."""
        if self.every_n_epochs and round(state.epoch or 0) % self.every_n_epochs == 0:
            self._fire(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **found: Any) -> None:
        """Add the numbers to the metrics, from which the best model is chosen."""
        numbers: Mapping[str, float] = self._memory.scalars
        if self._trainer.is_in_train:
            self.learn(self._host)
        else:
            numbers = self._fire(state) if self.on_validate else {}
        found.get("metrics", {}).update({f"eval_{name}": number for name, number in numbers.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Show what the trained model looks at."""
        self._fire(state)
        self.end(self._host)
        for logger in self._host.loggers:
            if hasattr(logger, "file_writer"):  # reopened by writing after the Trainer closed it
                logger.close()
        self.close()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Save the state next to the checkpoint: which images were watched, and the last results."""
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.state_dict(), folder / _STATE)

    def _fire(self, state: TrainerState) -> Mapping[str, float]:
        return self.observe(self._host, state.global_step)


class TrainerHost(Host):
    """The host for Hugging Face's Trainer."""

    name = "RolloutCallback"
    by_name = True

    def __init__(self, trainer: Trainer) -> None:
        root, loggers = trainer.args.output_dir or ".", list(_loggers(trainer))
        super().__init__(unwrapped(trainer.model), root=root, loggers=loggers)  # type: ignore[arg-type]
        self.trainer, self.group = trainer, Group.of(trainer.model_wrapped)
        self.callbacks = trainer.callback_handler.callbacks
        self.run = next((Path(one.log_dir) for one in loggers if hasattr(one, "log_dir")), None)

    def validation(self) -> Any:
        """Return the loader of the `eval_dataset`, or a mapping of loaders if there are several."""
        data = self.trainer.eval_dataset
        if isinstance(data, Mapping) and not hasattr(data, "features"):
            return {name: self.loader(name) for name in data}
        return None if data is None else self.loader()

    def loader(self, data: Any = None) -> Any:
        """Return a loader of a data set with the Trainer's collator; the Trainer does not cache it."""
        trainer, prepared = self.trainer, self.trainer.accelerator._dataloaders
        kept, count = vars(trainer).pop("_eval_dataloaders", None), len(prepared)
        try:
            return trainer.get_eval_dataloader(data)
        finally:
            vars(trainer).pop("_eval_dataloaders", None)
            if kept is not None:
                vars(trainer)["_eval_dataloaders"] = kept
            del prepared[count:]

    def explained(self, weights: str) -> nn.Module:
        """Return the model, or the averaged weights that it or a callback holds."""
        in_step = self.group.in_step and weights != "ema"
        return self.trainer.model_wrapped if in_step else super().explained(weights)

    def normalizers(self) -> Iterable[Any]:
        """Return the image processor."""
        return [getattr(self.trainer, "processing_class", None)]

    def class_names(self) -> Sequence[str] | None:
        """Return the class names in the model's config, unless they are placeholders such as LABEL_0."""
        return declared_names(self.model)

    def settings(self) -> Mapping[str, Any]:
        """Return the training arguments that differ from their defaults."""
        args = self.trainer.args
        given: Mapping[str, Any] = args.to_dict()  # type: ignore[no-untyped-call]
        changed = {name: value for name, value in given.items() if value != getattr(type(args), name, [])}
        return {**super().settings(), **changed}

    def metrics(self) -> Mapping[str, float]:
        """Return the latest value of each metric that was logged."""
        lines = self.trainer.state.log_history
        logged = {name: value for line in lines for name, value in line.items()}
        return {name: value for name, value in logged.items() if name not in ("step", "epoch")}

    def epoch(self) -> float | None:
        """Return the number of completed epochs, including a fraction."""
        return self.trainer.state.epoch


def _loggers(trainer: Trainer) -> Iterator[Any]:
    """Yield the runs that the Trainer reports to, on rank 0; they outlive the training."""
    for callback in trainer.callback_handler.callbacks:
        if (writer := getattr(callback, "tb_writer", None)) is not None:
            yield writer
        if (run := getattr(getattr(callback, "_wandb", None), "run", None)) is not None:
            yield WandbRun(run, "train/global_step")
        mlflow = getattr(callback, "_ml_flow", None)
        if mlflow is not None and mlflow.active_run() is not None:
            yield MlflowRun(mlflow.MlflowClient(), mlflow.active_run().info.run_id)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
