"""Which images are watched: the same ones at every firing and in every run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from vitx.errors import VitxError
from vitx.inputs.choosing import preprocessing_of
from vitx.inputs.prepared import to_tensor
from vitx.pictures.colors import Scale
from vitx.watch.batches import Content, Told, objects, read_batch
from vitx.watch.labels import class_counts, class_names, evenly_spaced, one_of_each_class
from vitx.watch.loading import among, data_of, fetch, join, length, one_of, sampled, spread_over
from vitx.watch.nested import last
from vitx.watch.scales import held_by
from vitx.watch.seen import Seen

if TYPE_CHECKING:
    from vitx.watch.host import Host

Read = Callable[[Any], Content]

_THUMBNAIL = 4  # pixels
_SCALES = 16  # of those that a data set holds


@dataclass(frozen=True)
class Samples:
    """Images to watch, with what is known of them; on the CPU.

    Attributes:
        images: (n, C, H, W), as the model takes them.
        labels: (n, ...), or None.
        masks: (n, h, w) bool, True on the object, or None.
        inputs: what else comes with each image, by name, (n, ...).
        shown: which of them the pictures show.
        places: where they are in the data set, or None.
        out_of: how many images the data set has, or None.
        class_names: the data set's own, or None.
        counts: how many outputs a model of the data set's classes may have, or None.
        unlabelled: whether it is the set that the model is judged by, and has no labels.
        scales: mean and std of each normalisation that the data set holds.
        name: the path of the images in the batch.
        source: the kind of their data set; empty for a tensor or files.
        found: what was found where, in words.
        seen: whether they are what the user's own step takes.
        stream: whether they are the first of a data set that cannot be asked for others.
    """

    images: Tensor
    labels: Tensor | None = None
    masks: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    shown: tuple[int, ...] = ()
    places: tuple[int, ...] | None = None
    out_of: int | None = None
    class_names: tuple[str, ...] | None = None
    counts: range | None = None
    unlabelled: bool = False
    scales: tuple[Scale, ...] = ()
    name: str = ""
    source: str = ""
    found: tuple[str, ...] = ()
    seen: bool = False
    stream: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def captions(self) -> Tensor:
        """The token ids of each image's own caption, (n, L).

        Raises:
            VitxError: There are none.
        """
        named = {last(path): value for path, value in self.inputs.items()}
        for ids in (named.get("input_ids"), self.labels):
            if ids is not None and ids.ndim == 2 and not ids.is_floating_point():
                return ids
        raise VitxError(
            'target="caption" needs the token ids of a caption for each image: give batches with '
            '"input_ids", or (images, token ids)'
        )

    def thumbnails(self) -> Tensor:
        """Returns tiny copies, (n, C, 4, 4), by which the images are known again after a resume."""
        images = self.images.float()
        return F.adaptive_avg_pool2d(images.flatten(1, -3) if images.ndim > 4 else images, _THUMBNAIL)


@dataclass(frozen=True)
class Selection:
    """What the user wants to see.

    Attributes:
        images: a tensor (n, C, H, W), a data set, a list of image files, indices into the validation set,
            or None: evenly spaced from the validation set.
        num_images: how many of a tensor or a data set are shown; named files and places are all shown.
        num_measured: how many of a data set the numbers are means over; at least those shown.
        per_class: show one image of each class of the data set.
        dataloader_idx: which of several validation loaders, by its number or its name.
        batch_transform: turns a batch of the loader into one that `read_batch` can read.
        boxes: of the images chosen, or of the whole data set: boxes or masks, see `objects`.
        told: which items of a batch are which.
    """

    images: Any = None
    num_images: int = 8
    num_measured: int = 8
    per_class: bool = False
    dataloader_idx: int | str = 0
    batch_transform: Callable[[Any], Any] | None = None
    boxes: Tensor | None = None
    told: Told | None = None

    def choose(self, host: "Host", before: Sequence[int] | None = None, seen: Seen | None = None) -> Samples:
        """Fetches the images, prepared as validation batches are.

        Args:
            host: gives the validation set, prepares the batches, and knows the transform for image files.
            before: places in the data set that were chosen before a resume; they are kept if they fit.
            seen: what the user's step does with a batch of the loader.

        Returns:
            The samples.

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
        return self._of_loader(loader, partial(self._read, host, seen), before, seen)

    def _of_tensor(self, images: Tensor, count: int) -> Samples:
        content = read_batch(images)
        samples = Samples(content.images.cpu(), shown=evenly_spaced(len(images), count))
        return self._with_objects(samples)

    def _of_loader(self, loader: Any, read: Read, before: Sequence[int] | None, seen: Seen | None) -> Samples:
        data = data_of(loader)
        source = loader if data is None else data
        keys = sampled(loader)
        if keys is None and (self.per_class or _are(self.images, int)):
            raise VitxError(
                f"images of {type(source).__name__} have no indices, as in a stream: give images instead"
            )
        key_of = None if keys is None else _by_place(keys)
        places = None if key_of is None else self._places(loader, key_of, read, before)
        chosen = None if key_of is None else [key_of.get(place, place) for place in places or ()]
        spread = spread_over(loader, self.num_measured) if chosen is None else None
        with fetch(loader, chosen, spread) as batches:
            contents = map(read, batches)
            content = join(contents, self.num_measured if places is None else len(places), spread)
        count, names = len(content.images), class_names(data)
        samples = Samples(
            content.images,
            content.labels,
            content.masks,
            content.inputs,
            self._shown(count),
            places,
            None if keys is None else length(loader, keys),
            names,
            class_counts(data, names),
            content.labels is None and (self.images is None or _are(self.images, int)),
            tuple(islice(held_by(data, loader, self.batch_transform), _SCALES)),
            content.name,
            type(source).__name__,
            content.found,
            seen is not None and self.batch_transform is None and content.name == seen.images[0],
            keys is None and spread is None,
        )
        return self._with_objects(samples)

    def _places(
        self,
        loader: Any,
        key_of: Mapping[int, Any],
        read: Read,
        before: Sequence[int] | None,
    ) -> tuple[int, ...]:
        """Chooses among the places that the loader reads."""
        places, keys = list(key_of), list(key_of.values())
        if not places:
            raise VitxError("the data set to take images from is empty")
        if _are(self.images, int):
            return _within(self.images, length(loader, keys))
        count = min(self.num_measured, len(places))
        if before is not None and len(before) == count and set(before) <= set(places):
            return tuple(before)
        if not self.per_class:
            return tuple(places[number] for number in evenly_spaced(len(places), count))
        with ExitStack() as reading:
            found = one_of_each_class(
                *(among(loader, keys), count),
                lambda order: self._labels(
                    reading.enter_context(fetch(loader, [keys[number] for number in order])), read
                ),
            )
        return tuple(places[number] for number in found)

    def _shown(self, count: int) -> tuple[int, ...]:
        return evenly_spaced(count, count if _are(self.images, int) else min(self.num_images, count))

    def _labels(self, batches: Iterable[Any], read: Read) -> Iterator[int | None]:
        for batch in batches:
            content = read(batch)
            if content.labels is None or content.labels.ndim != 1:
                yield None
            else:
                yield from map(int, content.labels)

    def _read(self, host: "Host", seen: Seen | None, batch: Any) -> Content:
        """Prepares a batch as it is for the model, and reads it."""
        place = self.dataloader_idx if isinstance(self.dataloader_idx, int) else 0
        batch = host.prepared(batch, place)
        if self.batch_transform is not None:
            return read_batch(self.batch_transform(batch), self.told).cpu()
        return read_batch(batch, self.told, seen).cpu()

    def _with_objects(self, samples: Samples) -> Samples:
        """Adds the boxes or masks that were given for these images, or for the whole data set."""
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
    """Whether the images are given as a list of this kind."""
    return isinstance(images, Sequence) and len(images) > 0 and all(isinstance(i, kind) for i in images)


def _data_set(images: Any) -> Any:
    if isinstance(images, IterableDataset) or (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
        return images
    raise VitxError(
        "images must be a tensor, a data set, a list of files, indices into the validation set or None, "
        f"found {type(images).__name__}"
    )


def _by_place(keys: Sequence[Any]) -> dict[int, Any]:
    """The key of each place; keys that are no numbers are counted."""
    return {key if isinstance(key, int) else number: key for number, key in enumerate(keys)}


def _within(places: Sequence[int], length: int) -> tuple[int, ...]:
    for place in places:
        if not 0 <= place < length:
            raise VitxError(f"the validation set has {length} images, 0 to {length - 1}: there is no {place}")
    return tuple(places)
