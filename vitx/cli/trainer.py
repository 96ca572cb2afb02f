"""Many pictures on several devices, through Lightning's `Trainer.predict`: each one exactly once."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter
from torch.utils.data import DataLoader

from vitx.cli.delivery import Delivery
from vitx.cli.found import Finding
from vitx.cli.many import Explainer, progress_bar
from vitx.errors import VitxError


class Explaining(pl.LightningModule):
    """What Lightning moves to its devices and calls with batches."""

    def __init__(self, explainer: Explainer, files: Sequence[Path]) -> None:
        super().__init__()
        self.model = explainer.subject.model  # as a part of the module, it goes to the device
        self.explainer, self.files = explainer, files

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Leaves it to the explainer: what is shown stays where it is."""
        return batch

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Finding]:
        """Returns what is found in each picture."""
        return list(self.explainer(batch, self.files))


class Writing(BasePredictionWriter):
    """Has what was found in each picture written as soon as it was found.

    Args:
        deliver: returns what has it written, given the number of devices on this machine.
        count: of all pictures.
        progress: show how far all devices are, as if they were equally fast.
    """

    def __init__(self, deliver: Callable[[int], Delivery], count: int, progress: bool) -> None:
        super().__init__("batch")
        self._deliver, self._count, self._progress = deliver, count, progress
        self._delivery: Delivery | None = None
        self._bar: Any = None
        self.errors: dict[int, str] = {}

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepares what is written to."""
        self._delivery = self._deliver(trainer.num_devices)
        self._bar = progress_bar(self._count, self._progress and trainer.is_global_zero)
        if trainer.is_global_zero:
            self._delivery.begin()

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Gives the pictures of a batch to the writers, and remembers those that could not be read."""
        assert self._delivery is not None
        self.errors |= batch["errors"]
        for finding in prediction:
            self._delivery.add(finding)
        done = (len(batch["places"]) + len(batch["errors"])) * trainer.world_size
        self._bar.update(min(done, self._count - self._bar.n))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits until all is written, and tells every rank what the others could not read."""
        assert self._delivery is not None
        self._delivery.finish()
        self._close()
        if trainer.world_size > 1:
            parts: list[dict[int, str]] = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.errors)
            self.errors = {place: error for part in parts for place, error in part.items()}

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lets what is being written be finished."""
        self._close()

    def _close(self) -> None:
        for opened in (self._delivery, self._bar):
            if opened is not None:
                opened.close()


def predict(
    explainer: Explainer,
    files: Sequence[Path],
    loader: Callable[[int], DataLoader[Any]],
    deliver: Callable[[int], Delivery],
    *,
    progress: bool,
    **settings: Any,
) -> tuple[dict[int, str], bool]:
    """Explains all pictures.

    Args:
        explainer: explains a batch.
        files: the pictures.
        loader: returns what reads them, given the number of devices on this machine.
        deliver: returns what has them written, given the same.
        progress: show how far it is.
        **settings: of Lightning's Trainer: `accelerator`, `devices`, `num_nodes`, `strategy`.

    Returns:
        By its place, why a picture could not be read; and whether this process is to speak for all.
    """
    writing = Writing(deliver, len(files), progress)
    with _quiet():
        trainer = _trainer(callbacks=[writing], enable_progress_bar=False, **settings)
        try:
            trainer.predict(
                Explaining(explainer, files), loader(trainer.num_devices), return_predictions=False
            )
        except SystemExit as stop:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from stop
    return writing.errors, trainer.is_global_zero


def _trainer(**settings: Any) -> pl.Trainer:
    try:
        return pl.Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            inference_mode=False,
            **settings,
        )
    except (ImportError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
        said = " ".join(str(error).split())
        raise VitxError(f"Lightning's Trainer does not take these settings: {said}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what Lightning says of its own set-up."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)
