"""Distribution of pictures over devices with Lightning's Trainer, each picture exactly once."""

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from vitx.errors import failure

Explain = Callable[..., dict[int, str]]  # explains the share of a process, and returns its errors


class _Share(pl.LightningModule):
    """Module that explains the share of one device, in its only predict step."""

    def __init__(self, model: nn.Module, explain: Explain) -> None:
        super().__init__()
        self.model, self._explain = model, explain
        self.errors: dict[int, str] = {}

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Explain this device's share, wait for the other devices, and collect the errors of all."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        self.errors = self._explain(self.device, rank, world, devices=self.trainer.num_devices)
        if world > 1:
            parts: list[dict[int, str]] = [{}] * world
            torch.distributed.all_gather_object(parts, self.errors)
            self.errors = {number: error for part in parts for number, error in part.items()}


def predict(model: nn.Module, explain: Explain, **settings: Any) -> tuple[dict[int, str], bool]:
    """Explain all pictures, with a model that Lightning moves to each device.

    Return index -> error for unreadable pictures, and whether this process reports for all.
    """
    share = _Share(model, explain)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it logs its own setup
    try:
        with failure("Lightning's Trainer does not take these settings"):
            trainer = pl.Trainer(barebones=True, inference_mode=False, **settings)
        trainer.predict(share, [[0]], return_predictions=False)  # one batch, whose contents are not used
    except SystemExit as stop:  # Lightning turns an interrupt into this
        raise KeyboardInterrupt from stop
    finally:
        logger.setLevel(level)
    return share.errors, trainer.is_global_zero
