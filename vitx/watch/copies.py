"""Copies of loaders: reading them makes no iterator of the user's own, nor touches its workers."""

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from vitx.errors import VitxError
from vitx.watch.samplers import keys_of, reads_whole_batches

BATCH = 32  # images read at once where no loader says
_DEEP = 4  # wrappers in wrappers, and collections of them
_MANY = 64  # loaders in a collection
_COPY = "_is_a_copy_of_vitx"
_WRITTEN = (list, dict, set, deque)  # in place, by loaders that keep count
_AS_TORCHS = ("torch", "torchdata")  # whose own loaders change no batch
_DATA = (str, bytes, int, float, torch.dtype, torch.device, Tensor, np.ndarray, np.generic, Dataset)

Replace = Callable[[DataLoader[Any]], DataLoader[Any]]


def over(loader: DataLoader[Any], keys: Sequence[Any] | None, size: int | None = None) -> DataLoader[Any]:
    """Return a new DataLoader as a given one, over samples with these keys; of a stream (None), over all.

    A data set that the user's loader reads in workers is read in a worker here too: files that it opens
    there do not stay open here.
    """
    names = ("worker_init_fn", "multiprocessing_context") if loader.num_workers else ()
    settings: dict[str, Any] = {name: getattr(loader, name) for name in (*names, "collate_fn")}
    data = loader.dataset if keys is None else Subset(loader.dataset, list(keys))
    size = None if reads_whole_batches(loader) else size or loader.batch_size or BATCH
    workers = min(loader.num_workers, 1)
    new: DataLoader[Any] = DataLoader(data, batch_size=size, num_workers=workers, **settings)
    vars(new).update({_COPY: True, "_iterator": None})
    return new


def readers(loader: Any) -> list[DataLoader[Any]]:
    """Return the DataLoaders that a loader is or read from, each once."""
    copier = _Copier(lambda one: one)
    copier.copy(loader)
    return copier.found


def over_all(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a new DataLoader over all that a given one reads."""
    return over(loader, keys_of(loader))


def copied(loader: Any, replace: Replace = over_all) -> Any:
    """Copy a loader and the loaders inside, with new DataLoaders in place of those that it reads from."""
    return _Copier(replace).copy(loader)


@contextmanager
def replaced_as_read(replace: Replace) -> Iterator[None]:
    """Put a new DataLoader in place of each of the user's that this thread begins to read.

    A copy may not have found one: a function that a loader calls may know it.
    """
    begin, thread = DataLoader.__iter__, threading.get_ident()

    def begin_a_copy(self: DataLoader[Any]) -> Any:
        own = threading.get_ident() == thread and not hasattr(self, _COPY)
        return begin(replace(self) if own else self)

    DataLoader.__iter__ = begin_a_copy  # type: ignore[method-assign]
    try:
        yield
    finally:
        DataLoader.__iter__ = begin  # type: ignore[method-assign]


class _Copier:
    """Make one copy of each object that takes part in reading."""

    def __init__(self, replace: Replace) -> None:
        self.replace = replace
        self.found: list[DataLoader[Any]] = []
        self.met = 0  # of those, again or for the first time
        self.made: dict[int, Any] = {}
        self.of_data: dict[int, DataLoader[Any]] = {}  # the new loader of each data set

    def copy(self, value: Any, deep: int = 0) -> Any:
        value = getattr(value, "base_dataloader", value)  # Accelerate's synchronise ranks
        self.met += isinstance(value, DataLoader)
        if id(value) in self.made:
            return self.made[id(value)]
        if isinstance(value, MethodType) and id(value.__self__) in self.made:
            return MethodType(value.__func__, self.made[id(value.__self__)])
        if deep > _DEEP:
            return value
        if isinstance(value, DataLoader):
            return self._reader(value, deep)
        if type(value) in (list, tuple, dict) and len(value) <= _MANY:
            if isinstance(value, dict):
                return {key: self.copy(item, deep + 1) for key, item in value.items()}
            return type(value)(self.copy(item, deep + 1) for item in value)
        if isinstance(value, _WRITTEN) or getattr(value, "ndim", 0) == 1:  # an order, which loaders shuffle
            return copy(value)
        return self._wrapper(value, deep) if _is_loader(value) else value

    def _reader(self, value: DataLoader[Any], deep: int) -> Any:
        new = self.replace(value)
        self.found.append(value)
        self.of_data[id(value.dataset)] = self.made[id(value)] = new
        if type(value).__module__.split(".")[0] in _AS_TORCHS or type(value).__iter__ is DataLoader.__iter__:
            return new
        own = self._wrapper(value, deep)
        vars(own).update(vars(new))
        return own

    def _wrapper(self, value: Any, deep: int) -> Any:
        met, parts = self.met, vars(value)
        new = self.made[id(value)] = _empty(type(value))
        live = {name: part for name, part in parts.items() if is_live(part)}
        vars(new).update(live)
        vars(new).update(
            {name: self.copy(part, deep + 1) for name, part in parts.items() if name not in live}
        )
        for name in live.keys() - {"_iterator"}:  # which is torch's own
            loader = self.of_data.get(id(getattr(live[name], "_dataset", None)))
            if loader is None:
                raise read_once(live[name], "holds")
            vars(new)[name] = _later(loader)
        if isinstance(value, Iterator) and self.met == met:
            if not all(map(_is_data, parts.values())):
                raise read_once(value)
            getattr(new, "reset", bool)()
        return new


def read_once(value: Any, verb: str = "is") -> VitxError:
    """Return the error of a loader that cannot be copied."""
    kind = type(value).__name__
    return VitxError(f"the validation loader {verb} a {kind}, which can be read only once: give images")


def _empty(kind: type) -> Any:
    """Return an object of a class without its `__del__`, which would end what the user's own holds."""
    if hasattr(kind, "__del__"):
        kind = type(kind.__name__, (kind,), {"__del__": lambda self: None})
    return object.__new__(kind)


def _later(loader: DataLoader[Any]) -> Iterator[Any]:
    yield from loader


def _is_loader(value: Any) -> bool:
    keyed = isinstance(value, Dataset) and not isinstance(value, IterableDataset)
    others = (type, Tensor, nn.Module, tuple)
    written = isinstance(getattr(type(value), "__iter__", None), FunctionType) and hasattr(value, "__dict__")
    return written and not keyed and not isinstance(value, others)


def is_live(value: Any) -> bool:
    """Return whether it is an iterator that cannot be copied."""
    if isinstance(value, _BaseDataLoaderIter):
        return True
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and not _is_loader(value)


def _is_data(value: Any) -> bool:
    """Return whether reading leaves it as it is: no pipeline of another library."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_data, islice(value.values() if isinstance(value, dict) else value, _MANY)))
    return value is None or isinstance(value, _DATA)
