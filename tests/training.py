"""Trainings that are the same in every call, and a comparison of all that they leave behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from tests.lightning_models import SmallClassifier, fit, samples


class Losses(Logger):
    """A logger that stores the training losses of `self.log` by step."""

    name = version = "losses"

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.values[step] = metrics["train/loss"]

    def log_hyperparams(self, *_, **__):
        pass


@dataclass
class Setting:
    """One test case: settings of the trainer, the callback, the module and the loaders."""

    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], pl.LightningModule] = SmallClassifier
    beside: Callable[[], list[pl.Callback]] = list
    loader: dict[str, Any] = field(default_factory=dict)
    validation: bool = True


def train(setting: Setting, folder: Path, *callbacks: pl.Callback) -> dict[str, torch.Tensor]:
    """Train for two epochs of four steps, and return everything that must be the same."""
    losses = Losses()
    data = DataLoader(samples(16), batch_size=4, shuffle=True, **setting.loader)
    validation = (
        DataLoader(samples(8, seed=1), batch_size=4, **setting.loader) if setting.validation else None
    )
    options = {"logger": losses, "default_root_dir": folder} | setting.trainer
    callbacks = *setting.beside(), *callbacks
    trainer, _ = fit(*callbacks, module=setting.module, data=(data, validation), **options)
    return outcome(trainer, losses)


def outcome(trainer: pl.Trainer, losses: Losses) -> dict[str, torch.Tensor]:
    """Return every tensor that the training left behind, by name."""
    found = {f"weight {name}": value for name, value in trainer.lightning_module.state_dict().items()}
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer {number}, {index}.{name}": value for name, value in state.items()}
    found |= {f"gradient {name}": p.grad for name, p in trainer.lightning_module.named_parameters()}
    found |= {f"loss at step {step}": torch.tensor(value) for step, value in losses.values.items()}
    found |= {"the next random numbers": torch.rand(3), "numpy's": torch.tensor(np.random.rand(3))}
    return found


def assert_same(plain: dict[str, torch.Tensor], watched: dict[str, torch.Tensor]) -> None:
    assert plain.keys() == watched.keys(), sorted(plain.keys() ^ watched.keys())
    different = [
        name
        for name, value in plain.items()
        if value is not watched[name] and not torch.equal(value, watched[name])  # gradients may be None
    ]
    assert not different, f"{len(different)} of {len(plain)} tensors differ: {', '.join(different)}"
