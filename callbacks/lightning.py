"""The callback for PyTorch Lightning."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from vitx.errors import VitxError
from vitx.watch import Host, Observer
from vitx.watch.host import Group

if TYPE_CHECKING or find_spec("pytorch_lightning") is None:
    Callback = pl.Callback
else:
    from pytorch_lightning import Callback as _Twin

    class Callback(pl.Callback, _Twin):
        """A callback of both packages, as command lines and Hydra require the class of one of them."""


class RolloutCallback(Observer, Callback):
    """Log what the model looks at on fixed images, as pictures and numbers, while it trains.

    It fires before the first step, every n epochs or steps, and at the end of `fit`. Each firing logs one
    grid under `vitx/maps` (rows: images; columns: the input and each method's overlay), and numbers under
    `vitx/METHOD/...`, which are means over the images, at the step that `self.log` uses. Other callbacks can
    `monitor` these numbers. The training is bit for bit the same with and without the callback.

    The options are those of `vitx.watch.Settings`.

    Example:
        >>> trainer = Trainer(callbacks=[RolloutCallback(num_images=4)], logger=False)
    """

    _recording = ExitStack()  # of the current step; empty for errors before `setup`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state, as each `fit` is a run of its own (a checkpoint's state is loaded after this)."""
        self._recording = ExitStack()
        if stage == "fit" or self.on_validate:
            self.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the model looks at before it is trained; after a resume, continue the run."""
        if trainer.global_step:
            # The first is right for one optimizer; for several, the second is at most one too high.
            step = min(trainer.global_step, _steps_logged(trainer) + 1)
            self.resume(LightningHost(trainer, pl_module), trainer.global_step, step)
        elif self.at_start:
            self._fire(trainer, pl_module, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the first training step, if there is no validation or the module has no forward."""
        formless = type(pl_module).forward.__qualname__ == "LightningModule.forward"
        first = batch_idx == 0 and not trainer.enable_validation
        if first or (formless and self._explainer.observed is None):
            self._recording.enter_context(self.record_step(pl_module, batch, "training_step"))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the first validation step, also in the sanity check."""
        loaders = getattr(trainer.val_dataloaders, "iterables", trainer.val_dataloaders)
        names = dict(enumerate(loaders)) if isinstance(loaders, dict) else {}
        if batch_idx == 0 and self.dataloader_idx in (dataloader_idx, names.get(dataloader_idx)):
            self._recording.enter_context(self.record_step(pl_module, batch, "validation_step"))

    def _end_recording(self, *_: Any, **__: Any) -> None:
        self._recording.close()

    on_before_backward = on_validation_batch_end = on_exception = _end_recording

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Fire after every n-th step."""
        self._end_recording()  # of a step that calls backward itself, or not at all
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._fire(trainer, pl_module, _steps_logged(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fire at the end of every n-th epoch and, if asked for, of a validation or test outside of `fit`."""
        if trainer.state.fn != "fit":
            if self.on_validate:
                self._fire(trainer, pl_module, trainer.global_step)
        elif not trainer.sanity_checking and trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            self._fire_if_due(trainer, pl_module, _steps_logged(trainer))

    on_test_end = on_validation_end

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fire at the end of every n-th epoch that does not end with a validation."""
        self._fire_if_due(trainer, pl_module, _steps_logged(trainer) - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what the trained model looks at."""
        self._fire(trainer, pl_module, _steps_logged(trainer) - 1)
        self.end(LightningHost(trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the images and the folder."""
        self.close()

    def _fire_if_due(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._fire(trainer, module, step)

    def _fire(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self.observe(LightningHost(trainer, module), step, trainer.global_step)


class LightningHost(Host):
    """The host for PyTorch Lightning."""

    name = "RolloutCallback"

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        root = "." if "://" in trainer.default_root_dir else trainer.default_root_dir
        super().__init__(module, run=_run_of(trainer), root=root, loggers=trainer.loggers)
        self.trainer, self.module = trainer, module
        self.callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.leaves_files = not getattr(trainer, "fast_dev_run", False)
        # With all strategies but DDP, each rank holds only a shard of the model.
        in_step = "DDPStrategy" not in {kind.__name__ for kind in type(trainer.strategy).__mro__}
        self.group = Group(trainer.global_rank, trainer.world_size, trainer.world_size > 1 and in_step)

    def validation(self) -> Any:
        """Return the validation or test loaders, separate or combined, as the step receives them."""
        trainer = self.trainer
        loops = [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop]
        for loop in [trainer.test_loop] if trainer.state.fn == "test" else loops:
            if (combined := loop._combined_loader) is not None:
                return combined.iterables if combined._mode == "sequential" else _Together(combined)
        return None

    def explained(self, weights: str) -> nn.Module:
        """Return the module, or the averaged weights that it or a callback holds."""
        if weights == "ema":
            return super().explained(weights)
        mesh: Any = getattr(self.trainer.strategy, "_device_mesh", None)
        split = mesh is not None and "tensor_parallel" in mesh.mesh_dim_names
        if split and mesh["tensor_parallel"].size() > 1:
            raise VitxError("tensor parallelism gives each rank a part of the heads: explain a checkpoint")
        # Sharded strategies gather their parameters when the wrapped module is called.
        return self.trainer.strategy.model or self.module if self.group.in_step else self.module

    def prepared(self, batch: Any, place: int) -> Any:
        """Return a batch on its device, after the hooks of the module and of callbacks that may change it."""
        batch = self.trainer.precision_plugin.convert_input(batch)
        batch = self.module._on_before_batch_transfer(batch, dataloader_idx=place)
        batch = self.trainer.strategy.batch_to_device(batch, dataloader_idx=place)
        for callback in self._changing_batches():
            callback.on_validation_batch_start(self.trainer, self.module, batch, 0, place)
        return batch

    def _changing_batches(self) -> Iterator[pl.Callback]:
        """Yield earlier callbacks whose hook may change a batch; the recorded step includes later ones."""
        for callback in takewhile(lambda one: not isinstance(one, RolloutCallback), self.callbacks):
            hook = type(callback).on_validation_batch_start
            if not hook.__module__.startswith(("lightning.", "pytorch_lightning.")):
                yield callback

    def precision(self) -> AbstractContextManager[Any]:
        """Return the forward context of the trainer's precision."""
        return self.trainer.precision_plugin.forward_context()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Set the stage to validation, and drop what the forward pass logs for these images."""
        state, held = self.trainer.state, vars(self.module)
        stage, own = state.stage, {"log": held["log"]} if "log" in held else {}
        state.stage, held["log"] = type(stage)("validate"), lambda *_, **__: None  # type: ignore[misc]
        try:
            yield
        finally:
            state.stage = stage
            del held["log"]
            held.update(own)

    def normalizers(self) -> Iterable[Any]:
        """Return the attributes of data module, module and callbacks, whose hooks may normalize images."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return [vars(holder) for holder in (datamodule, self.module, *self._changing_batches()) if holder]

    def settings(self) -> Mapping[str, Any]:
        """Return the config of the command line, and the hyperparameters of module and data module."""
        known: dict[str, Any] = {}
        for callback in self.callbacks:
            if type(callback).__name__ == "SaveConfigCallback":
                known |= yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
        for holder in (getattr(self.trainer, "datamodule", None), self.module):
            known |= getattr(holder, "hparams_initial", None) or {}
        return {**super().settings(), **known}

    def metrics(self) -> Mapping[str, float]:
        """Return the metrics that callbacks can monitor."""
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def epoch(self) -> float:
        """Return the epoch, counted from 0."""
        return self.trainer.current_epoch

    def publish(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers to the metrics that callbacks can monitor, as `self.log` does."""
        self.trainer.callback_metrics.update({name: torch.tensor(n) for name, n in numbers.items()})


class _Together:
    """Validation loaders that yield one batch together, without Lightning's limit on batches."""

    def __init__(self, combined: CombinedLoader) -> None:
        self.loaders, self.mode = combined.iterables, combined._mode

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, *_ in CombinedLoader(self.loaders, self.mode))


def _run_of(trainer: Trainer) -> Path | None:
    """Return the folder of Lightning's checkpoints of this run; None without a logger that has files."""
    for logger in trainer.loggers[:1]:
        folder, version = str(logger.save_dir or trainer.default_root_dir), logger.version
        if version is not None and "://" not in folder:
            version = version if isinstance(version, str) else f"version_{version}"
            return Path(folder, str(logger.name or ""), version)
    return None


def _steps_logged(trainer: Trainer) -> int:
    """Return the step that `self.log` uses; unlike `global_step`, it counts several optimizers once."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps
