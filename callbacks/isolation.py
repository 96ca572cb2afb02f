"""Leaves no trace on the training: what a firing draws, runs or changes is put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng


@contextmanager
def no_trace(trainer: pl.Trainer) -> Iterator[None]:
    """Runs its block as if in validation, and puts the generators and the stage back.

    Covers torch's generators (CPU and CUDA), numpy's and Python's: a data set may draw from any of
    them, and starting to iterate a DataLoader draws from torch's. The model itself is kept as it was by
    `vitx.explain`.
    """
    stage = trainer.state.stage
    error: Exception | None = None
    with isolate_rng(), torch.inference_mode(False):
        trainer.state.stage = RunningStage.VALIDATING
        try:
            yield
        except Exception as raised:  # isolate_rng puts nothing back when its block raises
            error = raised
        finally:
            trainer.state.stage = stage
    if error is not None:
        raise error
