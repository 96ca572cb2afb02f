"""Answers of a training to what a watch asks of it, its processes, and attempts that must not stop it."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from vitx.errors import VitxError, in_words
from vitx.watch.calling import averaged, unwrapped
from vitx.watch.loggers import settings_of
from vitx.watch.readers import BATCH

T = TypeVar("T")
_log = logging.getLogger("vitx")

# Of a model of which each rank holds a part, by torch's FSDP (1 or 2); DeepSpeed's ZeRO leaves a `ds_id`.
_SHARDED = ("DTensor", "FlatParameter", "FullyShardedDataParallel")


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
        size, parts = torch.distributed.get_world_size(), (*model.parameters(), *model.modules())
        in_step = any(type(one).__name__ in _SHARDED or hasattr(one, "ds_id") for one in parts)
        return cls(torch.distributed.get_rank(), size, size > 1 and in_step)

    def share(self, count: int) -> slice:
        """Return which of `count` images are this rank's: equal parts, some empty if there are few."""
        rank, size = (0, 1) if self.in_step else (self.rank, self.size)
        return slice(count * rank // size, count * (rank + 1) // size)

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute something on rank 0, and return it on all ranks."""
        found: list[T] = self._gather(compute if self.rank == 0 else lambda: None)
        return found[0]

    def _gather(self, compute: Callable[[], Any]) -> list[Any]:
        if self.size == 1:
            return [compute()]
        value, own = None, None
        try:
            value = compute()
        except Exception as error:
            own = error
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, (value, own and in_words(own)))
        if own is not None:
            raise own
        for rank, (_, message) in enumerate(found):
            if message is not None:
                raise VitxError(f"on rank {rank}: {message}")
        return [value for value, _ in found]

    def of_parts(self, count: int, most: int, do: Callable[[slice], T]) -> list[T]:
        """Run a function on parts of `count` images, shared among ranks, and return what all found."""
        share = self.share(count)
        parts = [slice(at, min(at + most, share.stop)) for at in range(share.start, share.stop, most)]
        if self.in_step:
            return [*map(do, parts)]
        return [found for of_rank in self._gather(lambda: [*map(do, parts)]) for found in of_rank]

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Give every rank the buffers of rank 0, as BatchNorm's statistics differ if they are not shared."""
        if self.size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if type(buffer) is torch.Tensor]  # none is sharded
        values = self.from_first(lambda: [buffer.detach().cpu() for buffer in buffers])
        with torch.no_grad():
            for buffer, value in zip(buffers, values if self.rank else (), strict=False):
                buffer.copy_(value)


class Host:
    """Answer what a watch asks of a training. These are the answers of a plain loop.

    An adapter for a framework is a subclass that answers otherwise where the framework knows better. Files go
    to `run/vitx`, beside checkpoints; without a `run`, it is the next free `version_N` of the root.
    """

    name = "Watch"  # begins each sentence that the watch says
    leaves_files = True  # whether the run may leave any
    by_name = False  # whether the training gives the model what is in a batch by its names
    callbacks: Sequence[Any] = ()  # of the training, which may hold averaged weights

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        run: Path | None = None,
        root: str | Path = ".",
        loggers: Sequence[Any] = (),
    ) -> None:
        self.model, self.data, self.loggers = model, data, loggers
        self.run, self.root = run, Path(root)
        self.hyperparameters: Mapping[str, Any] = {}  # as far as the user says them
        self.numbers: Mapping[str, float] = {}  # of the training at this moment

    @cached_property
    def group(self) -> Group:
        """The processes that train together, once they have begun."""
        return Group.of(self.model)

    def validation(self) -> Any:
        """Return the validation loader, several of them (a list or a mapping), or None."""
        return self.data

    def loader(self, data: Any) -> Any:
        """Return a loader of a data set that was given."""
        return DataLoader(data, BATCH)

    def explained(self, weights: str) -> nn.Module:
        """Return the module that is explained now: the model, or averaged weights ("ema") that it holds."""
        return averaged(self.model, self.callbacks) if weights == "ema" else unwrapped(self.model)

    def prepared(self, batch: Any, place: int) -> Any:
        """Return a batch of the validation loader at a place as the model gets it."""
        return batch

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[Any]:
        """Return a context that keeps a firing out of what the framework counts and logs."""
        return nullcontext()

    def normalizers(self) -> Iterable[Any]:
        """Return what may hold the normalization of the images, beside the data set and the model."""
        return ()

    def class_names(self) -> Sequence[str] | None:
        """Return the names of the classes, where neither the user nor the data set says them."""
        return None

    def settings(self) -> Mapping[str, Any]:
        """Return the hyperparameters of the training, which may be nested."""
        of_loggers = [settings_of(logger) for logger in self.loggers]
        return {name: value for one in (*of_loggers, self.hyperparameters) for name, value in one.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return the numbers that the training has at this moment."""
        return self.numbers

    def epoch(self) -> float | None:
        """Return the epoch as the framework counts it; None where there is none."""
        return None

    def publish(self, numbers: Mapping[str, float]) -> None:
        """Tell other parts of the training the numbers of a firing, on every rank."""

    def warn(self, sentence: str) -> None:
        """Warn of what went wrong, on rank 0; through the logger where a project silences warnings."""
        if _is_silenced(sentence):
            _log.warning(sentence)
        else:
            warnings.warn(sentence, stacklevel=2)

    def inform(self, sentence: str) -> None:
        """Tell what went well, on rank 0: through the logger where someone listens, else to stderr."""
        if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
            _log.info(sentence)
        else:
            print(sentence, file=sys.stderr)


def _is_silenced(sentence: str) -> bool:
    """Return whether the filters of `warnings` ignore it; those of a module or a line do not count."""
    for action, message, category, module, line in warnings.filters:
        about_us = issubclass(UserWarning, category) and not (module or line)
        if about_us and (message is None or re.match(message, sentence)):
            return action == "ignore"
    return False


class Attempts:
    """Attempts at what may fail: errors stop the training, on all ranks together, only if asked for."""

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self._said: set[tuple[str, str]] = set()

    def on_first(self, host: Host, do: Callable[[], None]) -> None:
        """Run on rank 0 alone; where errors are raised, no other rank is left waiting."""
        if self._raises:
            host.group.from_first(do)
        elif host.group.rank == 0:
            do()

    @contextmanager
    def forgiving(self, host: Host, what: str, step: int | None = None) -> Iterator[None]:
        """Say on rank 0 what its block could not do, and go on, unless errors are to be raised.

        Each kind of error is said once in each place: texts may differ by a step or an address.
        """
        try:
            yield
        except Exception as error:
            if self._raises:
                raise
            known = (what, str(error) if isinstance(error, VitxError) else type(error).__name__)
            if known not in self._said and host.group.rank == 0:
                when = "" if step is None else f" at step {step}"
                host.warn(f"{host.name} {what}{when}: {in_words(error)}")
            self._said.add(known)
