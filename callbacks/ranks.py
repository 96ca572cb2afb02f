"""Several processes that train together: they share the work, and fail together.

Every function here is called by all of them, in the same order. An error in one is told to the others, so
that none waits for a message that never comes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from vitx.errors import VitxError, in_words

T = TypeVar("T")


def in_step(trainer: pl.Trainer) -> bool:
    """Whether all ranks must run the same passes: in all but DDP, each holds only a part of the model."""
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    return trainer.world_size > 1 and "DDPStrategy" not in kinds


def share(trainer: pl.Trainer, count: int) -> slice:
    """Returns which of `count` images are this rank's: equal parts, some of them empty if there are few."""
    if trainer.world_size == 1 or in_step(trainer):
        return slice(0, count)
    rank, ranks = trainer.global_rank, trainer.world_size
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def from_first(trainer: pl.Trainer, compute: Callable[[], T]) -> T:
    """Computes something on rank 0, and returns it on all ranks."""
    if trainer.world_size == 1:
        return compute()
    value, error = _attempt(compute) if trainer.is_global_zero else (None, None)
    value, message = trainer.strategy.broadcast((value, error and in_words(error)), 0)
    if error is not None:
        raise error
    if message is not None:
        raise VitxError(f"on rank 0: {message}")
    return value  # type: ignore[return-value]


def from_all(trainer: pl.Trainer, compute: Callable[[], T]) -> list[T]:
    """Computes something on every rank, and returns on each of them what all computed, by rank."""
    if trainer.world_size == 1 or in_step(trainer):
        return [compute()]
    value, error = _attempt(compute)
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, (value, error and in_words(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(found):
        if message is not None:
            raise VitxError(f"on rank {rank}: {message}")
    return [value for value, _ in found]


def take_buffers_of_first(trainer: pl.Trainer, model: nn.Module) -> None:
    """Gives every rank the buffers of rank 0, as BatchNorm's statistics differ where they are not shared."""
    if trainer.world_size == 1:
        return
    buffers = [buffer for buffer in model.buffers() if type(buffer) is torch.Tensor]  # none is sharded
    values = trainer.strategy.broadcast([buffer.detach().cpu() for buffer in buffers], 0)
    if trainer.is_global_zero:
        return
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, error
