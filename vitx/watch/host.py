"""The interface of a watch to a training, its processes, and error handling that need not stop it."""

import logging
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

# Types that show that a model is sharded by torch's FSDP (1 or 2); DeepSpeed's ZeRO sets a `ds_id`.
_SHARDED = ("DTensor", "FlatParameter", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Group:
    """The processes of a training; one process if there is no process group."""

    rank: int = 0  # of this process
    size: int = 1
    in_step: bool = False  # whether all must run the same passes, as each holds only a shard of the model

    @classmethod
    def of(cls, model: nn.Module) -> "Group":
        """Return the process group of torch.distributed, and whether the model is sharded over it."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        size, parts = torch.distributed.get_world_size(), (*model.parameters(), *model.modules())
        in_step = any(type(one).__name__ in _SHARDED or hasattr(one, "ds_id") for one in parts)
        return cls(torch.distributed.get_rank(), size, size > 1 and in_step)

    def share(self, count: int) -> slice:
        """Return this rank's slice of `count` images: equal and possibly empty parts, or all if `in_step`."""
        rank, size = (0, 1) if self.in_step else (self.rank, self.size)
        return slice(count * rank // size, count * (rank + 1) // size)

    def from_first(self, compute: Callable[[], T]) -> T:
        """Compute a value on rank 0, and return it on all ranks."""
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
        """Run a function on slices of up to `most` images, shared among ranks, and return all the results."""
        share = self.share(count)
        parts = [slice(at, min(at + most, share.stop)) for at in range(share.start, share.stop, most)]
        if self.in_step:
            return [*map(do, parts)]
        return [found for of_rank in self._gather(lambda: [*map(do, parts)]) for found in of_rank]

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0 to all ranks, as BatchNorm's statistics may differ between them."""
        if self.size == 1:
            return
        buffers = [buffer for buffer in model.buffers() if type(buffer) is torch.Tensor]  # not sharded ones
        values = self.from_first(lambda: [buffer.detach().cpu() for buffer in buffers])
        with torch.no_grad():
            for buffer, value in zip(buffers, values if self.rank else (), strict=False):
                buffer.copy_(value)


class Host:
    """The interface of a watch to a training, implemented for a plain loop.

    An adapter for a framework is a subclass that overrides what the framework provides. Files go to
    `run/vitx`, next to the checkpoints; without a `run`, the next free `version_N` in `root` takes its place.
    """

    name = "Watch"  # begins each message of the watch
    leaves_files = True  # whether the run may write any
    by_name = False  # whether the training passes the entries of a batch to the model as keyword arguments
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
        self.hyperparameters: Mapping[str, Any] = {}  # if the user gives any
        self.numbers: Mapping[str, float] = {}  # metrics of the training at this moment

    @cached_property
    def group(self) -> Group:
        """The processes that train together, determined once, after they have started."""
        return Group.of(self.model)

    def validation(self) -> Any:
        """Return the validation loader, several of them (a list or a mapping), or None."""
        return self.data

    def loader(self, data: Any) -> Any:
        """Return a loader for a data set that the user gives."""
        return DataLoader(data, BATCH)

    def explained(self, weights: str) -> nn.Module:
        """Return the module to explain: the model, or averaged weights ("ema") held by it or a callback."""
        return averaged(self.model, self.callbacks) if weights == "ema" else unwrapped(self.model)

    def prepared(self, batch: Any, place: int) -> Any:
        """Return a batch of the validation loader with index `place` as the model receives it."""
        return batch

    def precision(self) -> AbstractContextManager[Any]:
        """Return a context that sets the precision of a forward pass."""
        return nullcontext()

    def paused(self) -> AbstractContextManager[Any]:
        """Return a context in which the framework neither counts nor logs what a firing does."""
        return nullcontext()

    def normalizers(self) -> Iterable[Any]:
        """Return objects that may hold the images' normalization, besides the data set and the model."""
        return ()

    def class_names(self) -> Sequence[str] | None:
        """Return class names for when neither the user nor the data set gives any, or None."""
        return None

    def settings(self) -> Mapping[str, Any]:
        """Return the hyperparameters of the training, which may be nested."""
        of_loggers = [settings_of(logger) for logger in self.loggers]
        return {name: value for one in (*of_loggers, self.hyperparameters) for name, value in one.items()}

    def metrics(self) -> Mapping[str, float]:
        """Return the metrics of the training at this moment."""
        return self.numbers

    def epoch(self) -> float | None:
        """Return the epoch as the framework counts it, or None if it does not."""
        return None

    def publish(self, numbers: Mapping[str, float]) -> None:
        """Pass the numbers of a firing to other parts of the training, on every rank."""

    def warn(self, sentence: str) -> None:
        """Issue a warning on rank 0, through the logger if the project silences warnings."""
        if self.group.rank:
            return
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn(sentence, stacklevel=2)
        for one in heard:
            warnings.showwarning(one.message, one.category, one.filename, one.lineno)
        if not heard:
            _log.warning(sentence)

    def inform(self, sentence: str) -> None:
        """Report a fact, on rank 0: through the logger if it is enabled and has a handler, else on stderr."""
        if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
            _log.info(sentence)
        else:
            print(sentence, file=sys.stderr)


class Attempts:
    """Attempts that may fail: errors become warnings or, on request, stop the training on all ranks."""

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self._said: set[tuple[str, str]] = set()

    def on_first(self, host: Host, do: Callable[[], None]) -> None:
        """Run on rank 0 alone; if errors are raised, they are raised on all ranks, so that none waits."""
        if self._raises:
            host.group.from_first(do)
        elif host.group.rank == 0:
            do()

    @contextmanager
    def forgiving(self, host: Host, what: str, step: int | None = None) -> Iterator[None]:
        """Warn on rank 0 of what the block could not do, and go on, unless errors are to be raised.

        Each kind of error is reported once per place, as messages may differ by a step or an address.
        """
        try:
            yield
        except Exception as error:
            if self._raises:
                raise
            known = (what, str(error) if isinstance(error, VitxError) else type(error).__name__)
            if known not in self._said:
                when = "" if step is None else f" at step {step}"
                host.warn(f"{host.name} {what}{when}: {in_words(error)}")
            self._said.add(known)
