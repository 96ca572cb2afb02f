"""Asks a DataLoader which samples it reads, and leaves its sampler and its generators as they were."""

import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

_MOST = 1_000_000  # places, of a sampler that never ends
_DEEP = 8  # attributes of attributes
_MANY = 64  # items of a collection that are looked at
_OBJECTS = 5_000  # that are looked at in all
_OTHERS = (str, bytes, int, float, Tensor, np.ndarray, nn.Module, type, FunctionType, MethodType, ModuleType)


def reads_stream(loader: DataLoader[Any]) -> bool:
    """Says whether its data set has no places."""
    return isinstance(loader.dataset, IterableDataset)


def reads_whole_batches(loader: DataLoader[Any]) -> bool:
    """Says whether its data set yields batches."""
    return loader.batch_sampler is None


def asked_for(loader: DataLoader[Any]) -> list[Any] | None:
    """Returns the keys that a loader asks its data set for, in all ranks together: places, as a rule.

    A sampler may name other keys than whole numbers, and leave out or repeat some. Whole numbers come in
    their order, each once. Where the data set yields batches, each key is one of a batch.

    Returns:
        The keys; None for a stream, whose samples have none.
    """
    if reads_stream(loader):
        return None
    data: Any = loader.dataset
    sampler: Any = loader.sampler if reads_whole_batches(loader) else loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # this rank's share of it, as Accelerate makes it
        sampler = sampler.batch_sampler
    if not isinstance(sampler, Sampler) and isinstance(getattr(sampler, "sampler", None), BatchSampler):
        sampler = sampler.sampler  # repeated for ever, as timm does it
    batches = not reads_whole_batches(loader)
    if batches and (
        type(sampler) is BatchSampler or isinstance(getattr(sampler, "sampler", None), DistributedSampler)
    ):
        sampler, batches = sampler.sampler, False
    if isinstance(sampler, DistributedSampler):  # this rank's share, maybe of a sampler of the user's own
        whole = getattr(sampler.dataset, "_sampler", None)
        sampler = range(len(data)) if whole is None else whole
    found: list[Any]
    with _as_it_was(sampler):
        found = list(islice(sampler, _MOST))
    keys = [key for batch in found for key in batch] if batches else found
    if all(hasattr(key, "__index__") for key in keys):
        return sorted({operator.index(key) for key in keys})
    return keys


@contextmanager
def _as_it_was(sampler: Any) -> Iterator[None]:
    """Lets a sampler be asked for its places: what it counts and draws from is put back."""
    parts = [part for part in (sampler, getattr(sampler, "sampler", None)) if hasattr(part, "__dict__")]
    before = [dict(vars(part)) for part in parts]
    try:
        with same_draws(sampler):
            yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(kept)


@contextmanager
def same_draws(holder: Any) -> Iterator[None]:
    """Seeds the generators that an object holds, for the same images in every run, and puts them back."""
    restores: list[Callable[[], Any]] = []
    for one in islice(_held(holder), _OBJECTS):
        if isinstance(one, torch.Generator):
            restores.append(partial(one.set_state, one.get_state()))
            one.manual_seed(0)
        elif isinstance(one, random.Random):
            restores.append(partial(one.setstate, one.getstate()))
            one.seed(0)
        elif isinstance(one, np.random.RandomState):
            restores.append(partial(one.set_state, one.get_state()))
            one.seed(0)
        elif isinstance(one, np.random.Generator):
            bits = one.bit_generator
            restores.append(partial(setattr, bits, "state", bits.state))
            bits.state = type(bits)(0).state
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _held(value: Any) -> Iterator[Any]:
    """Yields an object and what it consists of, a few levels deep."""
    seen: set[int] = set()
    waiting = deque([(value, 0)])
    while waiting:
        one, deep = waiting.popleft()
        if id(one) in seen or isinstance(one, _OTHERS):
            continue
        seen.add(id(one))
        yield one
        if deep < _DEEP:
            waiting += [(part, deep + 1) for part in _parts(one)]


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from islice(value.values(), _MANY)
    elif isinstance(value, (list, tuple)):
        yield from islice(value, _MANY)
    else:
        yield from getattr(value, "__dict__", {}).values()
