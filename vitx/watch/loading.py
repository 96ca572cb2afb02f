"""Read chosen samples as the user's own loader does, and leave that loader as it was."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vitx.errors import VitxError, last_line
from vitx.watch.batches import Content
from vitx.watch.copies import (
    BATCH,
    Replace,
    copied,
    is_live,
    over,
    over_all,
    read_once,
    readers,
    replaced_as_read,
)
from vitx.watch.randomness import seeded
from vitx.watch.samplers import keys_of, reads_stream, reads_whole_batches

# The numbers of the batches to read, and where in each the images are, from 0 to 1.
Places = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class CombinedLoaders:
    """Loaders that give one batch together, with a part from each."""

    loaders: Sequence[Any]
    joined: Callable[[list[Any]], Any]  # makes a batch of its parts
    longest: bool  # whether the shorter begin again until the longest ends; else the shortest ends all

    def __iter__(self) -> Iterator[Any]:
        for parts in zip(*self.loaders, strict=False):
            yield self.joined(list(parts))

    def __len__(self) -> int:
        return min(map(len, self.loaders))


def one_of(loaders: Any, place: int | str) -> Any:
    """Return one of the validation loaders (one, a list or a mapping of them, or None), by number or name.

    Raises:
        VitxError: There is none, none of that name, or it can be read only once.
    """
    named = dict(enumerate(_flat(loaders))) | (loaders if isinstance(loaders, dict) else {})
    if not named:
        raise VitxError("there is no validation set: give images to watch")
    if place not in named and isinstance(loaders, CombinedLoaders):
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
    if isinstance(loaders, (dict, list, tuple)):
        for loader in loaders.values() if isinstance(loaders, dict) else loaders:
            yield from _flat(loader)
    elif loaders is not None:
        yield loaders


class Source:
    """The samples that a validation loader reads.

    Attributes:
        data: the data set; None where there is no single one.
        keys: of all samples, see `keys_of`; of combined loaders, tuples of keys. Samples have none (None) in
            a stream, in a loader that reads no DataLoader, or several of them in a way of its own, and where
            the data set yields batches.
    """

    def __init__(self, loader: Any) -> None:
        self._loader, self._readers = loader, readers(loader)
        self._parts = [Source(part) for part in loader.loaders] if isinstance(loader, CombinedLoaders) else []
        sets = {id(one.dataset): one.dataset for one in self._readers}
        self.data: Any = next(iter(sets.values())) if len(sets) == 1 else getattr(loader, "dataset", None)
        self.keys = self._keys()

    def _keys(self) -> list[Any] | None:
        if not self._parts:
            alone = len(self._readers) == 1 and not reads_whole_batches(self._readers[0])
            return keys_of(self._readers[0]) if alone else None
        columns = [part.keys for part in self._parts if part.keys]
        if len(columns) < len(self._parts):
            return None
        count = (max if self._loader.longest else min)(map(len, columns))
        return [tuple(keys[place % len(keys)] for keys in columns) for place in range(count)]

    @property
    def name(self) -> str:
        """The kind of the data set, or of the loader."""
        return type(self._loader if self.data is None else self.data).__name__

    @property
    def length(self) -> int | None:
        """The number of places, also of those that the loader never reads; None without keys."""
        if self.keys is None:
            return None
        return len(self.keys) if self._parts else max(len(self.data), len(self.keys))

    def labelled(self) -> Any:
        """Return the samples as a data set, which may list their labels."""
        return range(len(self.keys or ())) if self._parts else Subset(self.data, self.keys or ())

    def evenly_placed(self, count: int) -> Places | None:
        """Choose images evenly spaced over all batches; None for a stream, whose end is not known."""
        if any(map(reads_stream, self._readers)):
            return None
        try:
            batches = len(copied(self._loader))
        except (TypeError, NotImplementedError, RuntimeError):
            return None
        chosen: dict[int, list[float]] = {}
        for number in range(count):
            batch, place = divmod((number + 0.5) * batches / count, 1)
            chosen.setdefault(int(batch), []).append(place)
        return chosen

    @contextmanager
    def fetch(self, keys: Sequence[Any] | None, places: Places | None = None) -> Iterator[Iterator[Any]]:
        """Read batches of the samples with these keys, through a copy of the user's loader.

        Where samples have no keys, it reads the batches of these places (`evenly_placed`), or all from the
        start.
        """
        new = over_all if keys is None else self._over(keys)
        until = None if places is None else max(places, default=-1) + 1
        with seeded(self._loader), replaced_as_read(new):
            batches = _batches(copied(self._loader, new))
            try:
                numbered = enumerate(islice(batches, until))
                yield (batch for number, batch in numbered if places is None or number in places)
            except Exception as error:
                if "in DataLoader worker process" not in str(error):
                    raise
                raise VitxError(last_line(error)) from error
            finally:
                batches.close()

    def _over(self, keys: Sequence[Any]) -> Replace:
        """Return what makes a DataLoader over these samples in place of each that is read."""
        size, columns = None, {id(reader): keys for reader in self._readers}
        if self._parts:
            size = min(reader.batch_size or BATCH for reader in self._readers)  # in all
            firsts = [id(part._readers[0]) for part in self._parts]
            columns = {reader: [key[part] for key in keys] for part, reader in enumerate(firsts)}

        def new(reader: DataLoader[Any]) -> DataLoader[Any]:
            known = id(reader) in columns
            return over(reader, columns[id(reader)], size) if known else over_all(reader)

        return new


def _batches(loader: Any) -> Generator[Any, None, None]:
    try:
        yield from loader
    except RuntimeError as error:  # of a loader that counts batches as if it had them all
        if not isinstance(error.__cause__, StopIteration):
            raise


def join(contents: Iterable[Content], count: int, places: Places | None = None) -> Content:
    """Join what batches hold, up to a number of images; of batches that were chosen, the images there."""
    parts: list[Content] = []
    chosen = None if places is None else iter(places.values())
    for content in contents:
        rows = chosen and sorted({int(place * len(content)) for place in next(chosen)})
        parts.append(content.mapped(itemgetter(rows)) if rows else content)
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        raise VitxError("the data set to take images from is empty")
    # What is padded for each batch does not fit together; a forward that asks for it says that it is missing.
    inputs = {
        name: [part.inputs[name] for part in parts]
        for name, first in parts[0].inputs.items()
        if all(name in part.inputs and part.inputs[name].shape[1:] == first.shape[1:] for part in parts)
    }
    return replace(
        parts[0],
        images=_cat([part.images for part in parts]),
        labels=None if parts[0].labels is None else _cat([part.labels for part in parts]),
        masks=None if parts[0].masks is None else _cat([part.masks for part in parts]),
        inputs={name: _cat(values) for name, values in inputs.items()},
    ).mapped(itemgetter(slice(count)))


def _cat(tensors: Sequence[Tensor | None]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors if tensor is not None}
    if len(shapes) > 1:
        raise VitxError(f"the images must have one size to be explained together, found {sorted(shapes)}")
    return torch.cat([tensor for tensor in tensors if tensor is not None])
