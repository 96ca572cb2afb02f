"""Several processes that train together: they share the work, and fail together.

Every method here is called by all of them, in the same order. An error in one is told to the others, so
that none waits for a message that never comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from vitx.errors import VitxError, in_words

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a training; without a process group, it is one."""

    rank: int = 0  # of this process
    size: int = 1
    in_step: bool = False  # whether all must run the same passes, as each holds only a part of the model

    @classmethod
    def of(cls, model: nn.Module) -> "Group":
        """Return the processes that torch.distributed knows, and whether they share the parts of a model."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        size = torch.distributed.get_world_size()
        return cls(torch.distributed.get_rank(), size, size > 1 and _is_sharded(model))

    def share(self, count: int) -> slice:
        """Return which of `count` images are this rank's: equal parts, some empty if there are few."""
        if self.size == 1 or self.in_step:
            return slice(0, count)
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute something on rank 0, and return it on all ranks."""
        if self.size == 1:
            return compute()
        value, error = _attempt(compute) if self.rank == 0 else (None, None)
        first: tuple[T, str | None] = _broadcast((value, error and in_words(error)))
        return _checked([first], error)[0]

    def from_all(self, compute: Callable[[], T]) -> list[T]:
        """Compute something on every rank, and return on each of them what all computed, by rank."""
        if self.size == 1 or self.in_step:
            return [compute()]
        value, error = _attempt(compute)
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, (value, error and in_words(error)))
        return _checked(found, error)

    def of_parts(self, count: int, most: int, do: Callable[[slice], T]) -> list[T]:
        """Run a function on parts of `count` images, shared among ranks, and return what all found."""
        share = self.share(count)
        parts = [slice(at, min(at + most, share.stop)) for at in range(share.start, share.stop, most)]
        return [found for of_rank in self.from_all(lambda: [*map(do, parts)]) for found in of_rank]

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, as BatchNorm's statistics differ if they are not shared."""
        if self.size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if type(buffer) is torch.Tensor]  # none is sharded
        values = _broadcast([buffer.detach().cpu() for buffer in buffers])
        if self.rank == 0:
            return
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def _broadcast(value: Any) -> Any:
    held = [value]
    torch.distributed.broadcast_object_list(held, 0)
    return held[0]


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return compute(), None
    except Exception as error:
        return None, error


def _checked(found: Sequence[tuple[T, str | None]], own: Exception | None) -> list[T]:
    """Return the values of the first ranks, or raise this rank's own error, or that of another."""
    if own is not None:
        raise own
    for rank, (_, message) in enumerate(found):
        if message is not None:
            raise VitxError(f"on rank {rank}: {message}")
    return [value for value, _ in found]


def _is_sharded(model: nn.Module) -> bool:
    """Return whether a rank holds only a part of it, by torch's FSDP (1 or 2) or DeepSpeed's ZeRO."""
    sharded = {"DTensor", "FlatParameter"}
    return any(type(p).__name__ in sharded or hasattr(p, "ds_id") for p in model.parameters()) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    )
