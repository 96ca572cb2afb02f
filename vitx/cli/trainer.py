"""Many pictures on several devices, by Lightning's Trainer: each one exactly once."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from vitx.cli.many import Place
from vitx.errors import VitxError


class Share(pl.LightningModule):
    """Explains the share of one device, as the one step that Lightning has it do there.

    Args:
        model: that Lightning moves to the device.
        explain: explains the share of a place, and returns why pictures could not be read.
    """

    def __init__(self, model: nn.Module, explain: Callable[[Place], dict[int, str]]) -> None:
        super().__init__()
        self.model, self._explain = model, explain
        self.errors: dict[int, str] = {}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Explains, waits for the other devices, and takes what they could not read."""
        trainer = self.trainer
        place = Place(self.device, trainer.global_rank, trainer.world_size, trainer.num_devices)
        parts = [self._explain(place)]
        if place.world > 1:
            own, parts = parts[0], [{} for _ in range(place.world)]
            torch.distributed.all_gather_object(parts, own)
        self.errors = {number: error for part in parts for number, error in part.items()}


def predict(
    model: nn.Module, explain: Callable[[Place], dict[int, str]], **settings: Any
) -> tuple[dict[int, str], bool]:
    """Explains all pictures.

    Args:
        model: that explains them.
        explain: explains the share of a place, and returns why pictures could not be read.
        **settings: of Lightning's Trainer: `accelerator`, `devices`, `num_nodes`, `strategy`.

    Returns:
        By its place, why a picture could not be read; and whether this process is to speak for all.

    Raises:
        VitxError: Lightning does not take the settings.
    """
    share = Share(model, explain)
    parts = ("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "inference_mode")
    off: dict[str, Any] = dict.fromkeys((*parts, "logger"), False)
    with _quiet():
        try:
            trainer = pl.Trainer(**off, **settings)
        except (ImportError, RuntimeError, TypeError, ValueError, MisconfigurationException) as error:
            said = " ".join(str(error).split())
            raise VitxError(f"Lightning's Trainer does not take these settings: {said}") from error
        try:
            trainer.predict(share, [[0]], return_predictions=False)  # one batch: what is in it is not asked
        except SystemExit as stop:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from stop
    return share.errors, trainer.is_global_zero


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what Lightning says of its own set-up."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)
