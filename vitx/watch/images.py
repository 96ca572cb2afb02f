"""The watched images: the same ones at every firing and in every run."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset, Subset

from vitx.errors import VitxError, last_line
from vitx.inputs.prepared import preprocessing_of, to_tensor
from vitx.pictures.colors import Scale
from vitx.watch.batches import PARTS, Content, objects, read_batch
from vitx.watch.data_sets import are, class_counts, class_names, evenly_spaced, one_of_each_class, scales_in
from vitx.watch.host import Host
from vitx.watch.nested import last
from vitx.watch.observed import ObservedStep
from vitx.watch.readers import is_live, keys_of, loaders_in, read_once, replaced
from vitx.watch.settings import Settings

_SCALES = 16  # normalizations of a data set, at most


@dataclass(frozen=True)
class Samples(Content):
    """Images to watch, on the CPU, with facts about them and their data set."""

    shown: tuple[int, ...] = ()  # the indices of those that pictures show
    places: tuple[int, ...] | None = None  # their indices in the data set
    out_of: int | None = None  # how many images the data set has
    stream: bool = False  # whether they are the first of a stream, which offers no choice
    class_names: tuple[str, ...] | None = None  # the data set's own
    counts: range | None = None  # plausible numbers of outputs of a model for these classes
    unlabeled: bool = False  # whether they are from the validation set, and it has no labels
    scales: tuple[Scale, ...] = ()  # mean and std of each normalization that the data set holds
    source: str = ""  # the type of their data set; empty for a tensor or files
    observed: bool = False  # whether the user's own step takes them

    @property
    def captions(self) -> Tensor:
        """The token ids of each image's own caption, (n, L)."""
        named = {last(path): value for path, value in self.inputs.items()}
        for ids in (named.get("input_ids"), self.labels):
            if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
                return ids
        raise VitxError(
            'target="caption" needs the token ids of a caption for each image: give batches with '
            '"input_ids", or (images, token ids)'
        )


class Source:
    """The samples that a validation loader reads.

    There are no keys for a stream, a loader of no or several DataLoaders, or a data set of whole batches.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._readers = readers = [one for one in loaders_in(loader) if isinstance(one, DataLoader)]
        sets = {id(one.dataset): one.dataset for one in readers}
        self.data: Any = next(iter(sets.values())) if len(sets) == 1 else getattr(loader, "dataset", None)
        self.name = type(loader if self.data is None else self.data).__name__
        keys = keys_of(readers[0]) if len(readers) == 1 and readers[0].batch_sampler is not None else None
        places = ((key if isinstance(key, int) else place, key) for place, key in enumerate(keys or ()))
        self.keys: dict[int, Any] | None = None if keys is None else dict(places)  # by their indices
        self.length = None if self.keys is None else max(len(self.data), len(self.keys))  # type: ignore[arg-type]

    def evenly(self, count: int) -> list[float] | None:
        """Return evenly spaced images as positions in batches: 1.25 is a quarter through the second batch.

        None if the number of batches is unknown, as for a stream.
        """
        if any(isinstance(one.dataset, IterableDataset) for one in self._readers):
            return None
        with suppress(TypeError, RuntimeError):  # of a loader without a length
            batches = len(self._loader)
            return [(number + 0.5) * batches / count for number in range(count)]
        return None

    @contextmanager
    def fetch(self, places: Sequence[int] | None) -> Iterator[Iterator[Any]]:
        """Yield batches of the samples at these places (None for all); the user's loader stays unchanged."""
        known = self.keys or {}
        keys = None if places is None else [known.get(place, place) for place in places]
        with replaced(self._loader, keys) as loader, closing(_batches(loader)) as batches:
            yield batches


@dataclass(frozen=True)
class Selection:
    """The choice of the images to watch, as the settings ask."""

    settings: Settings
    host: Host
    observed: ObservedStep | None = None

    def choose(self, before: Sequence[int] | None = None) -> Samples:
        """Read the images, prepared like validation batches: those at the places `before`, if they fit."""
        samples, given = self._chosen(before), self.settings.boxes
        if given is None:
            return samples
        if len(given) not in (len(samples), samples.out_of):
            raise VitxError(f"boxes has {len(given)} entries for {len(samples)} images: give one for each")
        if len(given) != len(samples):  # for the whole data set
            given = given[list(samples.places or ())]
        masks, said = objects(given, (samples.images.shape[-2], samples.images.shape[-1]))
        return replace(samples, masks=masks, found=(*samples.found, f"{said}: as given"))

    def _chosen(self, before: Sequence[int] | None) -> Samples:
        images, host, settings = self.settings.images, self.host, self.settings
        if files := are(images, str | Path):
            images = to_tensor(images, preprocessing_of(host.model))
        if isinstance(images, Tensor):
            content = self._content(images)
            count = len(content)
            return Samples(
                **vars(content), shown=evenly_spaced(count, count if files else settings.num_images)
            )
        if images is None or are(images, int):
            return self._of_loader(one_of(host.validation(), settings.dataloader_idx), before)
        return self._of_loader(host.loader(images), before)

    def _of_loader(self, loader: Any, before: Sequence[int] | None) -> Samples:
        settings, observed = self.settings, self.observed
        source, named = Source(loader), are(settings.images, int)
        if source.keys is None and (settings.per_class or named):
            raise VitxError(f"images of {source.name} have no indices, as in a stream: give images instead")
        places = None if source.keys is None else self._places(source, before)
        spread = source.evenly(settings.num_measured) if places is None else None
        most = settings.num_measured if places is None else len(places)
        with source.fetch(places) as batches:
            content = join(self._some(batches, spread) if spread else map(self._read, batches), most)
        count, transform = len(content), settings.batch_transform
        return Samples(
            **vars(content),
            shown=evenly_spaced(count, count if named else settings.num_images),
            places=places,
            out_of=source.length,
            stream=places is None and spread is None,
            class_names=class_names(source.data),
            counts=class_counts(source.data),
            unlabeled=content.labels is None and (settings.images is None or named),
            scales=tuple(islice(scales_in(source.data, loader, transform), _SCALES)),
            source=source.name,
            observed=bool(observed and not transform and content.name == observed.images[0]),
        )

    def _places(self, source: Source, before: Sequence[int] | None) -> tuple[int, ...]:
        settings, keys = self.settings, source.keys or {}
        if not (places := list(keys)):
            raise VitxError("the data set to take images from is empty")
        if are(settings.images, int):
            length = source.length or 0
            if wrong := [place for place in settings.images if not 0 <= place < length]:
                known = f"the validation set has {length} images, 0 to {length - 1}"
                raise VitxError(f"{known}: there is no {wrong[0]}")
            return tuple(settings.images)
        count = min(settings.num_measured, len(places))
        if before is not None and len(before) == count and set(before) <= set(places):
            return tuple(before)
        if not settings.per_class:
            return tuple(places[number] for number in evenly_spaced(len(places), count))

        def labels(order: Sequence[int]) -> Iterator[int | None]:
            """Yield the class of each sample; None if it does not have a single one."""
            with source.fetch([places[number] for number in order]) as batches:
                for content in map(self._read, batches):
                    single = content.labels is not None and content.labels.ndim == 1
                    yield from map(int, content.labels) if single else (None,)  # type: ignore[arg-type]

        found = one_of_each_class(Subset(source.data, list(keys.values())), count, labels)
        return tuple(places[number] for number in found)

    def _some(self, batches: Iterable[Any], spread: Sequence[float]) -> Iterator[Content]:
        """Yield the images of the batches that `Source.evenly` has chosen."""
        for number, batch in enumerate(islice(batches, int(spread[-1]) + 1)):
            if inside := [place - number for place in spread if int(place) == number]:
                content = self._read(batch)
                rows = sorted({int(place * len(content)) for place in inside})
                yield content.mapped(itemgetter(rows))

    def _read(self, batch: Any) -> Content:
        place = self.settings.dataloader_idx if isinstance(self.settings.dataloader_idx, int) else 0
        return self._content(self.host.prepared(batch, place), self.observed)

    def _content(self, batch: Any, observed: ObservedStep | None = None) -> Content:
        settings = self.settings
        if settings.batch_transform is not None:
            batch, observed = settings.batch_transform(batch), None
        return read_batch(batch, settings.items, observed).mapped(Tensor.cpu)


def one_of(loaders: Any, place: int | str) -> Any:
    """Return one validation loader, by number or name, of one, a list or a mapping of them (or None)."""
    flat = [one for one in tree_leaves(loaders) if one is not None]
    named = dict(enumerate(flat)) | (loaders if isinstance(loaders, dict) else {})
    if not named:
        raise VitxError("there is no validation set: give images to watch")
    if place not in named:
        raise VitxError(f"there is no validation loader {place!r}: there are {', '.join(map(str, named))}")
    loader = named[place]
    if not isinstance(loader, Iterable) or is_live(loader):
        raise read_once(loader)
    return loader


def _batches(loader: Any) -> Generator[Any, None, None]:
    try:
        yield from loader
    except Exception as error:
        if "in DataLoader worker process" in str(error):
            raise VitxError(last_line(error)) from error
        # A loader may count on more batches than it gets here.
        if not (isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration)):
            raise


def join(contents: Iterable[Content], count: int) -> Content:
    """Join the contents of batches, up to `count` images; labels or masks that some lack are left out.

    The form of all boxes is known if one batch tells it.
    """
    parts: list[Content] = []
    for content in contents:
        parts.append(content)
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        raise VitxError("the data set to take images from is empty")
    first = next((part for part in parts if not part.unsure), parts[0])
    if first.unsure:
        parts = [replace(part, masks=None) for part in parts]
    found = list(first.found)
    known: dict[str, Any] = dict.fromkeys(PARTS)
    # Inputs padded for each batch may not fit together; a forward that requires a missing one reports it.
    known["inputs"] = {
        name: torch.cat([part.inputs[name] for part in parts])
        for name, one in first.inputs.items()
        if all(name in part.inputs and part.inputs[name].shape[1:] == one.shape[1:] for part in parts)
    }
    for name in PARTS:
        values = [value for part in parts if (value := vars(part)[name]) is not None]
        sizes = {tuple(one.shape[1:]) for one in values}
        if name == "images" and len(sizes) > 1:
            raise VitxError(f"the images must have one size to be explained together, found {sorted(sizes)}")
        if len(values) == len(parts) and len(sizes) == 1:
            known[name] = torch.cat(values)
        elif values:
            found.append(f"{name}: left out, as not all batches have them")
    return replace(first, **known, found=tuple(found)).mapped(itemgetter(slice(count)))
