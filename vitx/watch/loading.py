"""Fetches chosen samples as the user's own loader does, and leaves that loader as it was."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vitx.errors import VitxError, last_line
from vitx.watch.batches import Content
from vitx.watch.copies import BATCH, copied, is_live, over, over_all, read_once, readers, users_own_spared
from vitx.watch.sampling import asked_for, reads_stream, reads_whole_batches, same_draws

# The numbers of the batches to read, and where in each the images are, from 0 to 1.
Spread = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Together:
    """Loaders that give one batch together, with a part from each.

    Attributes:
        loaders: one for each part.
        joined: makes a batch of its parts.
        longest: whether the shorter begin again until the longest ends; else the shortest ends all.
    """

    loaders: Sequence[Any]
    joined: Callable[[list[Any]], Any]
    longest: bool

    def __iter__(self) -> Iterator[Any]:
        for parts in zip(*self.loaders, strict=False):
            yield self.joined(list(parts))

    def __len__(self) -> int:
        return min(map(len, self.loaders))


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
    if place not in named and isinstance(loaders, Together):
        raise VitxError(
            "the validation loaders give one batch together: give batch_transform, not dataloader_idx"
        )
    if place not in named:
        raise VitxError(f"there is no validation loader {place!r}: there are {', '.join(map(str, named))}")
    loader = named[place]
    if not isinstance(loader, Iterable) or is_live(loader):
        raise read_once(loader)
    return loader


def _flat(loaders: Any) -> Iterator[Any]:
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        for loader in loaders:
            yield from _flat(loader)
    elif loaders is not None:
        yield loaders


def data_of(loader: Any) -> Any:
    """Returns the data set that a loader reads, or None where there is no single one."""
    found = {id(reader.dataset): reader.dataset for reader in readers(loader)}
    return next(iter(found.values())) if len(found) == 1 else getattr(loader, "dataset", None)


def sampled(loader: Any) -> list[Any] | None:
    """Returns the keys of all samples that a loader reads, see `asked_for`.

    Of loaders together, each key is a tuple, with a key for each loader.

    Returns:
        The keys; None where samples have none: in a stream, in a loader that reads no DataLoader, or several
        of them in a way of its own, and where the data set yields batches.
    """
    if isinstance(loader, Together):
        parts = [sampled(part) for part in loader.loaders]
        if not all(parts):
            return None
        longest = (max if loader.longest else min)(len(part or ()) for part in parts)
        return [tuple(part[place % len(part)] for part in parts if part) for place in range(longest)]
    found = readers(loader)
    return None if len(found) != 1 or reads_whole_batches(found[0]) else asked_for(found[0])


def among(loader: Any, keys: Sequence[Any]) -> Any:
    """Returns the samples with these keys as a data set, which may list their labels."""
    return range(len(keys)) if isinstance(loader, Together) else Subset(data_of(loader), keys)


def length(loader: Any, keys: Sequence[Any]) -> int:
    """Returns how many places there are, also those that the loader never reads."""
    return len(keys) if isinstance(loader, Together) else max(len(data_of(loader)), len(keys))


def spread_over(loader: Any, count: int) -> Spread | None:
    """Chooses images evenly spaced over all batches of a loader whose samples have no keys.

    Returns:
        Their batches; None for a stream, whose end is not known.
    """
    if any(map(reads_stream, readers(loader))):
        return None
    try:
        batches = len(copied(loader, over_all))
    except (TypeError, NotImplementedError, RuntimeError):
        return None
    chosen: dict[int, list[float]] = {}
    for number in range(count):
        batch, place = divmod((number + 0.5) * batches / count, 1)
        chosen.setdefault(int(batch), []).append(place)
    return chosen


@contextmanager
def fetch(loader: Any, keys: Sequence[Any] | None, spread: Spread | None = None) -> Iterator[Iterator[Any]]:
    """Reads batches of the samples with these keys (`sampled`), through a copy of the user's loader.

    Args:
        loader: what `one_of` has found.
        keys: None where samples have none.
        spread: which of all batches to read, see `spread_over`; None for all from the start.

    Yields:
        The batches.
    """
    new = _over_these(loader, keys)
    with same_draws(loader), users_own_spared(new):
        batches = _batches(copied(loader, new))
        try:
            if spread is None:
                yield batches
            else:
                until = islice(batches, max(spread, default=-1) + 1)
                yield (batch for number, batch in enumerate(until) if number in spread)
        except Exception as error:
            if "in DataLoader worker process" not in str(error):
                raise
            raise VitxError(last_line(error)) from error
        finally:
            batches.close()


def _over_these(loader: Any, keys: Sequence[Any] | None) -> Callable[[DataLoader[Any]], DataLoader[Any]]:
    """Says what takes the place of each DataLoader in a loader."""
    if keys is None:
        return over_all
    found, size = readers(loader), None
    columns = {id(reader): keys for reader in found}
    if isinstance(loader, Together):
        size = min(reader.batch_size or BATCH for reader in found)  # so that all parts have as many
        firsts = [readers(part)[0] for part in loader.loaders]
        columns = {id(reader): [key[part] for key in keys] for part, reader in enumerate(firsts)}

    def new(reader: DataLoader[Any]) -> DataLoader[Any]:
        known = id(reader) in columns
        return over(reader, columns[id(reader)], size) if known else over_all(reader)

    return new


def _batches(loader: Any) -> Generator[Any, None, None]:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # of a loader that counts batches as if it had them all
            if not isinstance(error.__cause__, StopIteration):
                raise
            return
        yield batch


def join(contents: Iterable[Content], count: int, spread: Spread | None = None) -> Content:
    """Joins what batches hold, up to a number of images; of batches that were chosen, the images there."""
    parts: list[Content] = []
    chosen = None if spread is None else iter(spread.values())
    for content in contents:
        parts.append(content if chosen is None else _rows(content, next(chosen)))
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


def _rows(content: Content, places: Sequence[float]) -> Content:
    rows = sorted({int(place * len(content.images)) for place in places})
    return replace(
        content,
        images=content.images[rows],
        labels=None if content.labels is None else content.labels[rows],
        masks=None if content.masks is None else content.masks[rows],
        inputs={name: value[rows] for name, value in content.inputs.items()},
    )


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Of one sample; None where there is none."""
    return None if tensor is None else tuple(tensor.shape[1:])


def _cat(tensors: Sequence[Tensor | None]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors if tensor is not None}
    if len(shapes) > 1:
        raise VitxError(f"the images must have one size to be explained together, found {sorted(shapes)}")
    return torch.cat([tensor for tensor in tensors if tensor is not None])
