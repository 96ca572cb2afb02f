"""The images that are watched: the same ones at every firing and in every run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from vitx.errors import VitxError
from vitx.inputs.choosing import preprocessing_of
from vitx.inputs.prepared import to_tensor
from vitx.pictures.colors import Scale
from vitx.watch.batches import Content, ItemNames, objects, read_batch
from vitx.watch.classes import class_counts, class_names, evenly_spaced, one_of_each_class
from vitx.watch.host import Host
from vitx.watch.loading import Source, join, one_of
from vitx.watch.nested import last
from vitx.watch.observed import ObservedStep
from vitx.watch.scales import scales_in

Read = Callable[[Any], Content]

_THUMBNAIL = 4  # pixels
_SCALES = 16  # of those that a data set holds


@dataclass(frozen=True)
class Samples(Content):
    """Images to watch, with what is known of them; on the CPU."""

    shown: tuple[int, ...] = ()  # which of them the pictures show
    places: tuple[int, ...] | None = None  # where they are in the data set
    out_of: int | None = None  # how many images the data set has
    class_names: tuple[str, ...] | None = None  # the data set's own
    counts: range | None = None  # how many outputs a model of the data set's classes may have
    unlabelled: bool = False  # whether it is the set that the model is judged by, and has no labels
    scales: tuple[Scale, ...] = ()  # mean and std of each normalization that the data set holds
    source: str = ""  # the kind of their data set; empty for a tensor or files
    observed: bool = False  # whether they are what the user's own step takes
    stream: bool = False  # whether they are the first of a data set that cannot be asked for others

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

    def thumbnails(self) -> Tensor:
        """Return tiny copies, (n, C, 4, 4), by which the images are known again after a resume."""
        images = self.images.float()
        return F.adaptive_avg_pool2d(images.flatten(1, -3) if images.ndim > 4 else images, _THUMBNAIL)


@dataclass(frozen=True)
class Selection:
    """The images that the user wants to see; `vitx.watch.Settings` explains the options."""

    images: Any = None
    num_images: int = 8
    num_measured: int = 8
    per_class: bool = False
    dataloader_idx: int | str = 0
    batch_transform: Callable[[Any], Any] | None = None
    boxes: Tensor | None = None
    items: ItemNames | None = None

    def choose(
        self, host: Host, before: Sequence[int] | None = None, observed: ObservedStep | None = None
    ) -> Samples:
        """Read the images, prepared as validation batches are; after a resume, those of before if they fit.

        Raises:
            VitxError: The images are of another kind, a batch holds none, or there is no validation set.
        """
        images = self.images
        if _are(images, str | Path):
            images = to_tensor(images, preprocessing_of(host.model))
            return self._of_tensor(images, len(images))
        if isinstance(images, Tensor):
            return self._of_tensor(images, min(self.num_images, len(images)))
        if images is None or _are(images, int):
            loader = one_of(host.validation(), self.dataloader_idx)
        else:
            loader = host.loader(_data_set(images))
        return self._of_loader(loader, partial(self._read, host, observed), before, observed)

    def _of_tensor(self, images: Tensor, count: int) -> Samples:
        shown = evenly_spaced(len(images), count)
        return self._with_objects(Samples(read_batch(images).images.cpu(), shown=shown))

    def _of_loader(
        self, loader: Any, read: Read, before: Sequence[int] | None, observed: ObservedStep | None
    ) -> Samples:
        source, named = Source(loader), _are(self.images, int)
        if source.keys is None and (self.per_class or named):
            raise VitxError(f"images of {source.name} have no indices, as in a stream: give images instead")
        places = chosen = spread = None
        if source.keys is None:
            spread = source.evenly_placed(self.num_measured)
        else:
            # Keys that are no numbers are counted.
            key_of = {key if isinstance(key, int) else place: key for place, key in enumerate(source.keys)}
            places = self._places(source, key_of, read, before)
            chosen = [key_of.get(place, place) for place in places]
        with source.fetch(chosen, spread) as batches:
            most = self.num_measured if places is None else len(places)
            content = join(map(read, batches), most, spread)
        names, count = class_names(source.data), len(content)
        samples = Samples(
            **vars(content),
            shown=evenly_spaced(count, count if named else min(self.num_images, count)),
            places=places,
            out_of=source.length,
            class_names=names,
            counts=class_counts(source.data, names),
            unlabelled=content.labels is None and (self.images is None or named),
            scales=tuple(islice(scales_in(source.data, loader, self.batch_transform), _SCALES)),
            source=source.name,
            observed=bool(observed and not self.batch_transform and content.name == observed.images[0]),
            stream=places is None and spread is None,
        )
        return self._with_objects(samples)

    def _places(
        self, source: Source, key_of: Mapping[int, Any], read: Read, before: Sequence[int] | None
    ) -> tuple[int, ...]:
        places, keys = list(key_of), list(key_of.values())
        if not places:
            raise VitxError("the data set to take images from is empty")
        if _are(self.images, int):
            return _within(self.images, source.length or 0)
        count = min(self.num_measured, len(places))
        if before is not None and len(before) == count and set(before) <= set(places):
            return tuple(before)
        if not self.per_class:
            return tuple(places[number] for number in evenly_spaced(len(places), count))
        with ExitStack() as reading:

            def labels(order: Sequence[int]) -> Iterator[int | None]:
                batches = reading.enter_context(source.fetch([keys[number] for number in order]))
                return _labels(map(read, batches))

            found = one_of_each_class(source.labelled(), count, labels)
        return tuple(places[number] for number in found)

    def _read(self, host: Host, observed: ObservedStep | None, batch: Any) -> Content:
        place = self.dataloader_idx if isinstance(self.dataloader_idx, int) else 0
        batch = host.prepared(batch, place)
        if self.batch_transform is not None:
            batch, observed = self.batch_transform(batch), None
        return read_batch(batch, self.items, observed).mapped(Tensor.cpu)

    def _with_objects(self, samples: Samples) -> Samples:
        """Add the boxes or masks that were given for these images, or for the whole data set."""
        given = self.boxes
        if given is None:
            return samples
        if len(given) not in (len(samples), samples.out_of):
            raise VitxError(f"boxes has {len(given)} entries for {len(samples)} images: give one for each")
        if len(given) != len(samples):
            given = given[list(samples.places or ())]
        masks, said = objects(given, (samples.images.shape[-2], samples.images.shape[-1]))
        return replace(samples, masks=masks, found=(*samples.found, f"{said} as given"))


def _are(images: Any, kind: Any) -> bool:
    return isinstance(images, Sequence) and len(images) > 0 and all(isinstance(i, kind) for i in images)


def _data_set(images: Any) -> Any:
    if isinstance(images, IterableDataset) or (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
        return images
    raise VitxError(
        "images must be a tensor, a data set, a list of files, indices into the validation set or None, "
        f"found {type(images).__name__}"
    )


def _labels(contents: Iterable[Content]) -> Iterator[int | None]:
    """Yield the class of each image; None for those that have no single one."""
    for content in contents:
        single = content.labels is not None and content.labels.ndim == 1
        yield from map(int, content.labels) if single else (None,)  # type: ignore[arg-type]


def _within(places: Sequence[int], length: int) -> tuple[int, ...]:
    for place in places:
        if not 0 <= place < length:
            raise VitxError(f"the validation set has {length} images, 0 to {length - 1}: there is no {place}")
    return tuple(places)
