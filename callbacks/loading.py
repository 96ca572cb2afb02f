"""Fetches chosen samples as the user's own loader does, and leaves that loader as it was."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vitx.callbacks.batches import Content
from vitx.errors import VitxError, last_line

BATCH = 32  # images read at once where no loader says


def validation_loader(trainer: pl.Trainer, place: int | str) -> DataLoader[Any]:
    """Returns one of the validation loaders.

    Args:
        trainer: in `fit`.
        place: the number of the loader, or its name where they are a mapping.

    Raises:
        VitxError: There is none, none of that name, or it is no DataLoader.
    """
    loaders = trainer.val_dataloaders
    named = dict(enumerate(_flat(loaders))) | (loaders if isinstance(loaders, dict) else {})
    if not named:
        raise VitxError("there is no validation set: give the callback images to watch")
    if place not in named:
        raise VitxError(f"there is no validation loader {place!r}: there are {', '.join(map(str, named))}")
    loader = named[place]
    if not isinstance(loader, DataLoader):
        raise VitxError(
            f"the validation loader is a {type(loader).__name__} and no DataLoader: give the callback images"
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


def fetch(loader: DataLoader[Any], places: Sequence[int] | None) -> Iterator[Any]:
    """Yields batches of the samples at these places; of a stream (None), batches from its start.

    A data set that the user's loader reads in workers is read in a worker here too: files that it opens
    there do not stay open here.
    """
    settings: dict[str, Any] = {"collate_fn": loader.collate_fn, "num_workers": min(loader.num_workers, 1)}
    if loader.num_workers:
        settings |= {
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    data = loader.dataset if places is None else Subset(loader.dataset, list(places))
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
    return Content(
        _cat([part.images for part in parts])[:count],
        None if first.labels is None else _cat([part.labels for part in parts])[:count],
        None if first.masks is None else _cat([part.masks for part in parts])[:count],
        {name: _cat([part.inputs[name] for part in parts])[:count] for name in names},
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Of one sample; None where there is none."""
    return None if tensor is None else tuple(tensor.shape[1:])


def _cat(tensors: Sequence[Tensor | None]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors if tensor is not None}
    if len(shapes) > 1:
        raise VitxError(f"the images must have one size to be explained together, found {sorted(shapes)}")
    return torch.cat([tensor for tensor in tensors if tensor is not None])
