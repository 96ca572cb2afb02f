"""The user's loaders: what they read, and how to read it without side effects."""

import io
import operator
import random
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from itertools import chain, islice
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Subset
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.data.sampler import Sampler

from vitx.errors import VitxError
from vitx.watch.data_sets import held_by

BATCH = 32  # images read at once if no loader sets a batch size
_MOST = 1_000_000  # keys to read of a sampler, which may never end
_DEEP = 4  # levels of wrappers and collections
_MANY = 64  # loaders in a collection, at most
_WRITTEN = (list, deque, dict, set)  # types that loaders change in place to keep count


def keys_of(loader: DataLoader[Any]) -> list[Any] | None:
    """Return the keys that a loader requests from its data set, over all ranks; None for a stream.

    Integer keys, the usual case, are sorted and unique. A data set of batches has one key for each batch.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler is not None
    sampler: Any = loader.batch_sampler if batches else loader.sampler
    while hasattr(sampler, "batch_sampler"):  # this rank's share of it, as in Accelerate
        sampler = sampler.batch_sampler
    if not isinstance(sampler, Sampler) and isinstance(getattr(sampler, "sampler", None), BatchSampler):
        sampler = sampler.sampler  # repeated forever, as in timm
    distributed = isinstance(getattr(sampler, "sampler", None), DistributedSampler)
    if batches and (type(sampler) is BatchSampler or distributed):
        sampler, batches = sampler.sampler, False
    if isinstance(sampler, DistributedSampler):  # this rank's share, maybe of the user's own sampler
        whole = getattr(sampler.dataset, "_sampler", None)
        sampler = range(len(loader.dataset)) if whole is None else whole  # type: ignore[arg-type]
    with restored(loader):
        found = list(islice(sampler, _MOST))
    keys = [key for batch in found for key in batch] if batches else found
    if all(hasattr(key, "__index__") for key in keys):
        return sorted({operator.index(key) for key in keys})
    return keys


def over(loader: DataLoader[Any], keys: Sequence[Any] | None) -> DataLoader[Any]:
    """Return a new DataLoader like a given one, over the samples with these keys, or over a stream (None).

    If the given one has workers, this one has a single worker, so that no files stay open in this process.
    """
    names = ("worker_init_fn", "multiprocessing_context") if loader.num_workers else ()
    settings: dict[str, Any] = {name: getattr(loader, name) for name in (*names, "collate_fn")}
    data = loader.dataset if keys is None else Subset(loader.dataset, list(keys))
    size = None if loader.batch_sampler is None else loader.batch_size or BATCH
    return DataLoader(data, batch_size=size, num_workers=min(loader.num_workers, 1), **settings)


def loaders_in(value: Any, deep: int = 0) -> list[Any]:
    """Return a loader and the loaders that it reads from, found in its attributes and in collections."""
    value, found, parts = _unprepared(value), list[Any](), list[Any]()
    if type(value) in (list, tuple, dict) and len(value) <= _MANY:
        parts = list(value.values() if isinstance(value, dict) else value)
    elif _is_loader(value):
        found = [value]
        parts = [] if isinstance(value, DataLoader) else list(vars(value).values())
        if once := [part for part in parts if is_live(part) and not isinstance(part, _BaseDataLoaderIter)]:
            raise read_once(once[0], "holds")
    if deep < _DEEP:
        found += [loader for part in parts for loader in loaders_in(part, deep + 1)]
    if isinstance(value, Iterator) and found and not any(isinstance(one, DataLoader) for one in found):
        raise read_once(value)
    return list({id(one): one for one in found}.values())


@contextmanager
def replaced(loader: Any, keys: Sequence[Any] | None) -> Iterator[Any]:
    """Yield a loader to read, whose DataLoaders are replaced when this thread iterates over them.

    The first one in the loader is replaced by one over the samples with these keys. Without keys, and for any
    other DataLoader, the new one reads all samples in a fixed order. All is restored after the block.
    """
    parts, thread = loaders_in(loader), threading.get_ident()
    begin, readers = DataLoader.__iter__, [one for one in parts if isinstance(one, DataLoader)]
    # torchdata's loaders have an __iter__ of their own.
    own = {kind for one in readers for kind in type(one).__mro__ if kind.__module__.startswith("torchdata.")}
    begins = {kind: vars(kind)["__iter__"] for kind in {DataLoader, *own} if "__iter__" in vars(kind)}

    def begun(one: DataLoader[Any]) -> Iterator[Any]:
        if threading.get_ident() == thread:
            return begin(over(one, keys if keys is not None and one is readers[0] else keys_of(one)))
        return next(begins[kind](one) for kind in type(one).__mro__ if kind in begins)

    with restored(*parts), ExitStack() as patches:
        for one in parts:
            for name, held in list(vars(one).items()):
                vars(one)[name] = _unprepared(held)
                if isinstance(held, _BaseDataLoaderIter) and name != "_iterator":  # this one is torch's own
                    of_data = [reader for reader in readers if reader.dataset is held._dataset]
                    if not of_data:
                        raise read_once(held, "holds")
                    vars(one)[name] = chain.from_iterable(map(begun, of_data[:1]))  # starts when it is read
        for kind, before in begins.items():
            patches.callback(setattr, kind, "__iter__", before)
            kind.__iter__ = begun  # type: ignore[attr-defined]
        yield _unprepared(loader)


_STORES = ("_parameters", "_buffers", "_modules")  # of a module


@contextmanager
def restored(*loaders: Any) -> Iterator[None]:
    """Restore what reading changes: attributes and containers of loaders and samplers, and random states."""
    kept = list(loaders)
    for one in kept:  # which grows
        samplers = (vars(one).get(name) for name in ("sampler", "batch_sampler"))
        kept += [sampler for sampler in samplers if hasattr(sampler, "__dict__")]
    held: list[Any] = [vars(one) for one in kept]
    items = [item for attributes in held for item in attributes.items()]
    held += [value for name, value in items if type(value) in _WRITTEN and name != "dataset"]
    before = [(one, copy(one)) for one in held]
    try:
        with seeded(*loaders):
            yield
    finally:
        for one, content in before:
            one.clear()
            (one.extend if isinstance(one, (list, deque)) else one.update)(content)


@contextmanager
def seeded(*holders: Any) -> Iterator[None]:
    """Seed all random generators for the block, and restore their states after it.

    These are the global ones of torch (CPU and CUDA), numpy and Python, those that the holders hold, and
    those at the top of the modules that define what they hold. Thus random transforms give the same images
    in every run, and a model that masks patches masks the same ones.
    """
    held = [*held_by(*holders)]
    names = {getattr(one, "__module__", "") for one in held} & {*sys.modules}
    held += [value for name in names for value in vars(sys.modules[name]).values()]
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    with ExitStack() as restoring:
        for one in (random, np.random, torch.default_generator, *devices, *held):
            if isinstance(one, torch.Generator):
                restoring.callback(one.set_state, one.get_state())
                one.manual_seed(0)
            elif one is random or (isinstance(one, random.Random) and type(one) is not random.SystemRandom):
                restoring.callback(one.setstate, one.getstate())
                one.seed(0)
            elif one is np.random or isinstance(one, np.random.RandomState):
                restoring.callback(one.set_state, one.get_state())
                one.seed(0)
            elif isinstance(one, np.random.Generator):
                bits = one.bit_generator
                restoring.callback(setattr, bits, "state", bits.state)
                bits.state = type(bits)(0).state
        yield


def held_by_modules(model: nn.Module) -> Iterator[Any]:
    """Yield what the modules of a model hold beside their parameters, buffers and submodules."""
    for module in model.modules():
        for name, value in vars(module).items():
            unused = isinstance(value, dict) and not value  # most often a module has no hooks
            if name not in _STORES and not unused:
                yield value


def is_live(value: Any) -> bool:
    """Return whether it is an iterator that cannot be restarted."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase) and not _is_loader(value)


def read_once(value: Any, verb: str = "is") -> VitxError:
    """Return the error for a loader that can be read only once."""
    kind = type(value).__name__
    return VitxError(f"the validation loader {verb} a {kind}, which can be read only once: give images")


def _unprepared(value: Any) -> Any:
    """Return the loader inside one of Accelerate's, as those synchronize ranks; else the value itself."""
    return vars(value).get("base_dataloader", value) if _is_loader(value) else value


def _is_loader(value: Any) -> bool:
    keyed = isinstance(value, Dataset) and not isinstance(value, IterableDataset)
    others = (type, Tensor, nn.Module, tuple, _BaseDataLoaderIter)
    written = isinstance(getattr(type(value), "__iter__", None), FunctionType) and hasattr(value, "__dict__")
    return written and not keyed and not isinstance(value, others)
