"""The samples that a DataLoader reads; its sampler and its generators stay as they were."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from vitx.watch.randomness import seeded

_MOST = 1_000_000  # places, of a sampler that never ends


def reads_stream(loader: DataLoader[Any]) -> bool:
    """Return whether its data set has no places."""
    return isinstance(loader.dataset, IterableDataset)


def reads_whole_batches(loader: DataLoader[Any]) -> bool:
    """Return whether its data set yields batches."""
    return loader.batch_sampler is None


def keys_of(loader: DataLoader[Any]) -> list[Any] | None:
    """Return the keys that a loader asks its data set for, in all ranks together; None for a stream.

    They are places, as a rule: whole numbers come in their order, each once. A sampler may name others, and
    leave out or repeat some. Where the data set yields batches, each key is one of a batch.
    """
    if reads_stream(loader):
        return None
    sampler: Any = loader.sampler if reads_whole_batches(loader) else loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # this rank's share of it, as Accelerate makes it
        sampler = sampler.batch_sampler
    if not isinstance(sampler, Sampler) and isinstance(getattr(sampler, "sampler", None), BatchSampler):
        sampler = sampler.sampler  # repeated for ever, as timm does it
    batches = not reads_whole_batches(loader)
    distributed = isinstance(getattr(sampler, "sampler", None), DistributedSampler)
    if batches and (type(sampler) is BatchSampler or distributed):
        sampler, batches = sampler.sampler, False
    if isinstance(sampler, DistributedSampler):  # this rank's share, maybe of a sampler of the user's own
        whole = getattr(sampler.dataset, "_sampler", None)
        sampler = range(len(loader.dataset)) if whole is None else whole  # type: ignore[arg-type]
    with _restored(sampler):
        found = list(islice(sampler, _MOST))
    keys = [key for batch in found for key in batch] if batches else found
    if all(hasattr(key, "__index__") for key in keys):
        return sorted({operator.index(key) for key in keys})
    return keys


@contextmanager
def _restored(sampler: Any) -> Iterator[None]:
    """Restore the counters and generators of a sampler after its block."""
    parts = [part for part in (sampler, getattr(sampler, "sampler", None)) if hasattr(part, "__dict__")]
    before = [dict(vars(part)) for part in parts]
    try:
        with seeded(sampler):
            yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(kept)
