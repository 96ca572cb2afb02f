"""Facts that a data set and other objects of the user's tell: names and labels of classes, normalizations."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from vitx.errors import VitxError
from vitx.inputs.preprocessing import normalization
from vitx.pictures.colors import BYTES, UNSCALED, Scale, fits
from vitx.watch.batches import LABELS
from vitx.watch.held import attributes, held_by

_NAMES = ("classes", "class_to_idx", "label_to_id", "class_names")
_MOST_READ = 2000  # samples, in search of classes where the data set does not tell them
_CHANNELS = 64  # at most
_SCALE_NAMES = ("mean", "std"), ("image_mean", "image_std")  # the second ones are those of image processors


def class_names(data: Any) -> tuple[str, ...] | None:
    """Return the names of the classes, as torchvision's, timm's and Hugging Face's data sets have them."""
    while data is not None:
        places = (data, getattr(data, "reader", None))
        held = (getattr(place, name, None) for name in _NAMES for place in places)
        if found := next(filter(None, map(names_in, (*held, _feature_names(data)))), None):
            return found
        data = getattr(data, "dataset", None) or next(iter(getattr(data, "datasets", ())), None)
    return None


def names_in(value: Any) -> tuple[str, ...] | None:
    """Return the names of classes that a list (also of synonyms), an array or a mapping to numbers holds."""
    if callable(value) and not isinstance(value, type):
        with suppress(Exception):  # a method of theirs that wants more
            value = value()
    if isinstance(value, Mapping):
        pairs = [(key, name) if hasattr(key, "__index__") else (name, key) for key, name in value.items()]
        if not all(hasattr(number, "__index__") for number, _ in pairs):
            return None
        value = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    if hasattr(value, "tolist"):  # an array or a tensor
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        return None
    return tuple(str(name[0]) if isinstance(name, tuple) and name else str(name) for name in value)


def class_counts(data: Any) -> range | None:
    """Return how many outputs a model may have, most of which must have one of the labels that are listed."""
    count = max((hasattr(data, "__len__") and _labels(data)) or [-1]) + 1
    return range(count, 2 * count + 1) if count else None


def one_of_each_class(
    data: Any, count: int, read_labels: Callable[[Sequence[int]], Iterable[int | None]]
) -> tuple[int, ...]:
    """Return the place of one sample of each class, in order; of more than `count`, evenly spaced ones."""
    labels, firsts, most = _labels(data), dict[int, int](), len(data)
    order: Sequence[int] = range(len(data))
    if labels is None:
        shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        order, most = shuffled[:_MOST_READ].tolist(), count
    for place, label in zip(order, labels or read_labels(order), strict=False):
        if label is None:
            raise VitxError("per_class=True needs a class for each sample, and the data set has none")
        firsts.setdefault(label, place)
        if len(firsts) == most:
            break
    classes = sorted(firsts)
    chosen = evenly_spaced(len(classes), min(count, len(classes)))
    return tuple(firsts[classes[number]] for number in chosen)


def evenly_spaced(length: int, count: int) -> tuple[int, ...]:
    """Return `count` places in a list, from the middles of equal parts: of 100, 4 are 12, 37, 62 and 87."""
    return tuple(int((place + 0.5) * length / count) for place in range(count))


def _labels(data: Any) -> Sequence[int] | None:
    if isinstance(data, Subset):
        whole = _labels(data.dataset)
        return None if whole is None else [whole[place] for place in data.indices]
    listed = [getattr(data, name, None) for name in ("targets", "labels", "_labels")]
    listed = list(data.tensors[1:2]) if isinstance(data, TensorDataset) else listed
    return next(filter(None, (_whole_numbers(values, len(data)) for values in listed)), None)


def _whole_numbers(values: Any, length: int) -> list[int] | None:
    numbers = values.tolist() if hasattr(values, "tolist") else values
    fits = isinstance(numbers, (list, tuple)) and len(numbers) == length
    return list(numbers) if fits and all(type(number) is int for number in numbers) else None


def _feature_names(data: Any) -> Sequence[str] | None:
    """Return the names of the labels in a data set of Hugging Face; None where several may be."""
    features = getattr(data, "features", None)
    if not isinstance(features, dict):
        return None
    columns = {name: names for name, column in features.items() if (names := getattr(column, "names", None))}
    found = [names for name, names in columns.items() if name in LABELS] or [*columns.values()]
    return found[0] if len(found) == 1 else None


def likely_scales(
    model: nn.Module, images: Tensor, of_data: Iterable[Scale], holders: Iterable[Any] = ()
) -> Iterator[Scale]:
    """Yield the normalizations that may have made the images, (n, C, H, W), the likeliest first.

    What holders hold and the model declares may be done later, in its forward: then the images do not fit it.
    """
    yield from of_data
    yield UNSCALED
    if bool((images == images.round()).all()):
        yield BYTES
    yield from (one for one in scales_in(*holders) if fits(images, one, whole=True))
    if fits(images, declared := normalization(model), whole=True):
        yield declared


def scales_in(*holders: Any) -> Iterator[Scale]:
    """Yield mean and std of what has them and is held, as torchvision's, timm's and kornia's transforms."""
    yield from filter(None, map(_scale, held_by(*holders, whole=_scale)))


def _scale(value: Any) -> Scale | None:
    """Return mean and std of an object, or among its options, as kornia's augmentations have them."""
    kept = attributes(value)
    options = [one for one in (kept, kept.get("flags"), kept.get("_buffers")) if isinstance(one, Mapping)]
    for named in options if kept.get("do_normalize", True) else ():
        for names in _SCALE_NAMES:
            mean, std = (_numbers(named.get(name)) for name in names)
            if mean and std and min(std) > 0:
                return mean, std
    return None


def _numbers(value: Any) -> tuple[float, ...]:
    with suppress(TypeError, ValueError, RuntimeError):
        numbers = torch.as_tensor(value, dtype=torch.float64).flatten()
        return tuple(numbers.tolist()) if len(numbers) <= _CHANNELS and not isinstance(value, bool) else ()
    return ()
