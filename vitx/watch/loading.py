"""Fetches chosen samples as the user's own loader does, and leaves that loader as it was."""

import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Subset

from vitx.errors import VitxError, last_line
from vitx.watch.batches import Content

BATCH = 32  # images read at once where no loader says
_MOST = 1_000_000  # places, of a sampler that never ends


def one_of(loaders: Any, place: int | str) -> Any:
    """Returns one of the validation loaders: a DataLoader, or anything that yields batches.

    Args:
        loaders: one, a list or a mapping of them, or None.
        place: the number of the loader, or its name where they are a mapping.

    Raises:
        VitxError: There is none, none of that name, or it can be read only once.
    """
    named = dict(enumerate(_flat(loaders))) | (loaders if isinstance(loaders, dict) else {})
    if not named:
        raise VitxError("there is no validation set: give images to watch")
    if place not in named:
        raise VitxError(f"there is no validation loader {place!r}: there are {', '.join(map(str, named))}")
    loader = named[place]
    if not isinstance(loader, DataLoader) and (
        not isinstance(loader, Iterable) or isinstance(loader, Iterator)
    ):
        raise VitxError(
            f"the validation loader is a {type(loader).__name__}, which can be read only once: give images"
        )
    return loader


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _flat(loader)
    elif loaders is not None:
        yield loaders


def sampled(loader: Any) -> list[Any] | None:
    """Returns what the loader asks its data set for, in all ranks together: places, as a rule.

    A sampler may name other keys than whole numbers, and leave out or repeat some. Whole numbers come in
    their order, each once.

    Returns:
        The keys; None for a stream, whose samples have none.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    data: Any = loader.dataset
    if loader.batch_sampler is None:  # the data set yields batches
        return None
    sampler: Any = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):  # this rank's share of it, as Accelerate makes it
        sampler = sampler.batch_sampler
    batches = True
    if type(sampler) is BatchSampler or isinstance(getattr(sampler, "sampler", None), DistributedSampler):
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
    restores: list[Callable[[], Any]] = []
    for value in (value for kept in before for value in kept.values()):
        if isinstance(value, torch.Generator):
            restores.append(partial(value.set_state, value.get_state()))
            value.manual_seed(0)  # the same images in every run
        elif isinstance(value, random.Random):
            restores.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.Generator):
            restores.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
    try:
        yield
    finally:
        for part, kept in zip(parts, before, strict=True):
            vars(part).clear()
            vars(part).update(kept)
        for restore in restores:
            restore()


def fetch(loader: Any, keys: Sequence[Any] | None) -> Iterator[Any]:
    """Yields batches of the samples with these keys; of a stream (None), batches from its start.

    A data set that the user's loader reads in workers is read in a worker here too: files that it opens
    there do not stay open here.
    """
    if not isinstance(loader, DataLoader):
        yield from loader
        return
    settings: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": min(loader.num_workers, 1)}
    if loader.num_workers:
        settings |= {
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    data = loader.dataset if keys is None else Subset(loader.dataset, list(keys))
    whole = loader.batch_sampler is None  # the data set yields batches
    try:
        yield from DataLoader(data, batch_size=None if whole else loader.batch_size or BATCH, **settings)
    except Exception as error:
        if "in DataLoader worker process" not in str(error):
            raise
        raise VitxError(last_line(error)) from error


def join(contents: Iterable[Content], count: int) -> Content:
    """Joins what batches hold, up to a number of images."""
    parts: list[Content] = []
    for content in contents:
        parts.append(content)
        if sum(len(part.images) for part in parts) >= count:
            break
    if not parts:
        raise VitxError("the data set to take images from is empty")
    first = parts[0]
    # What is padded for each batch does not fit together; a forward that asks for it says that it is missing.
    names = [name for name in first.inputs if len({_shape(part.inputs.get(name)) for part in parts}) == 1]
    return replace(
        first,
        images=_cat([part.images for part in parts])[:count],
        labels=None if first.labels is None else _cat([part.labels for part in parts])[:count],
        masks=None if first.masks is None else _cat([part.masks for part in parts])[:count],
        inputs={name: _cat([part.inputs[name] for part in parts])[:count] for name in names},
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Of one sample; None where there is none."""
    return None if tensor is None else tuple(tensor.shape[1:])


def _cat(tensors: Sequence[Tensor | None]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors if tensor is not None}
    if len(shapes) > 1:
        raise VitxError(f"the images must have one size to be explained together, found {sorted(shapes)}")
    return torch.cat([tensor for tensor in tensors if tensor is not None])
