"""Leaves no trace on the training: what a firing draws, runs, logs or changes is put back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def no_trace(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Runs its block as if in validation and without `self.log`, and puts everything back.

    Covers torch's generators (CPU and CUDA), numpy's and Python's: a data set may draw from any of
    them, and starting to iterate a DataLoader draws from torch's. They start from the same seed each time,
    so that random transforms give the same images. The model itself is kept as it was by `vitx.explain`.
    """
    stage = trainer.state.stage
    error: Exception | None = None
    with isolate_rng(), torch.inference_mode(False), _unlogged(module):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        trainer.state.stage = type(stage)("validate")  # type: ignore[misc]
        try:
            yield
        except Exception as raised:  # isolate_rng puts nothing back when its block raises
            error = raised
        finally:
            trainer.state.stage = stage
    if error is not None:
        raise error


@contextmanager
def _unlogged(module: pl.LightningModule) -> Iterator[None]:
    """A forward pass may log, and what it logs of these images is no part of the training."""
    before = vars(module).get("log")
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log
        if before is not None:
            module.log = before  # type: ignore[method-assign]
