"""Class names, labels and normalizations that data sets and other objects of the user hold."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from vitx.errors import VitxError
from vitx.inputs.preprocessing import normalization
from vitx.pictures.colors import BYTES, UNSCALED, Scale, fits
from vitx.watch.batches import LABELS

_NAMES = ("class_to_idx", "classes", "label_to_id", "class_names")  # labels are read by the first
_MOST_READ = 2000  # samples to search for classes if the data set does not list its labels
_CHANNELS = 1000  # at most, of a mean or a std
_SCALE_NAMES = ("mean", "std"), ("image_mean", "image_std")  # the second pair is that of image processors
_OPAQUE = (str, bytes, int, float, bool, type, ModuleType, Tensor, type(None))
_LIBRARIES = ("builtins", "torch", "torchvision", "lightning", "pytorch_lightning", "typing", "collections")
_DEEP = 7  # levels of nested attributes to search
_MOST = 256  # parts of a container to search; larger ones hold samples


def class_names(data: Any) -> tuple[str, ...] | None:
    """Return the class names that a data set of torchvision, timm or Hugging Face holds, or None."""
    while data is not None:
        places = (data, getattr(data, "reader", None))
        held = (getattr(place, name, None) for name in _NAMES for place in places)
        if found := next(filter(None, map(names_in, (*held, _feature_names(data)))), None):
            return found
        data = getattr(data, "dataset", None) or next(iter(getattr(data, "datasets", ())), None)
    return None


def names_in(value: Any) -> tuple[str, ...] | None:
    """Return the class names in a list (also of synonyms), an array, or a mapping to or from indices."""
    if isinstance(value, Mapping):
        value = _in_order(value)
    if hasattr(value, "tolist"):  # an array or a tensor
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        return None
    return tuple(str(name[0]) if isinstance(name, tuple) and name else str(name) for name in value)


def are(values: Any, kind: Any) -> bool:
    """Return whether it is a sequence, and not empty, of values of a kind."""
    return isinstance(values, Sequence) and len(values) > 0 and all(isinstance(one, kind) for one in values)


def _in_order(named: Mapping[Any, Any]) -> list[Any] | None:
    """Return the names in a mapping to or from 0, 1, ..., where keys may be digits; None for another one."""
    digits = [(int(key), name) for key, name in named.items() if str(key).isdecimal()]
    for pairs in (named.items(), zip(named.values(), named, strict=True), digits):
        found = {operator.index(number): name for number, name in pairs if hasattr(number, "__index__")}
        if found.keys() == {*range(len(named))}:
            return [found[number] for number in range(len(named))]
    return None


def class_counts(data: Any) -> range | None:
    """Return the plausible numbers of model outputs, given the labels that the data set lists."""
    count = max((hasattr(data, "__len__") and _labels(data)) or [-1]) + 1
    return range(count, 2 * count + 1) if count else None  # most outputs must have a label


def one_of_each_class(
    data: Any, count: int, read_labels: Callable[[Sequence[int]], Iterable[int | None]]
) -> tuple[int, ...]:
    """Return the index of one sample per class, in class order; of more than `count`, evenly spaced ones."""
    labels, firsts, most = _labels(data, sure=True), dict[int, int](), len(data)
    order: Sequence[int] = range(len(data))
    if labels is None:
        shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(0), device="cpu")
        order, most = shuffled[:_MOST_READ].tolist(), count
    for place, label in zip(order, labels or read_labels(order), strict=False):
        if label is None:
            raise VitxError("per_class=True needs a class for each sample, and the data set has none")
        firsts.setdefault(label, place)
        if len(firsts) == most:
            break
    classes = sorted(firsts)
    return tuple(firsts[classes[number]] for number in evenly_spaced(len(classes), count))


def evenly_spaced(length: int, most: int) -> tuple[int, ...]:
    """Return the middle indices of equal parts of a list: for 4 parts of 100, 12, 37, 62 and 87."""
    count = min(length, most)
    return tuple(int((place + 0.5) * length / count) for place in range(count))


def _labels(data: Any, sure: bool = False) -> Sequence[int] | None:
    """Return the listed labels; if they must be `sure`, not the second of more than two tensors."""
    if isinstance(data, Subset):
        whole = _labels(data.dataset, sure)
        return None if whole is None else [whole[place] for place in data.indices]
    listed: list[Any] = [getattr(data, name, None) for name in ("targets", "labels", "_labels")]
    if isinstance(data, TensorDataset):
        listed = [] if sure and len(data.tensors) > 2 else [*data.tensors[1:2]]
    for values in listed:
        numbers = values.tolist() if hasattr(values, "tolist") else values
        one_each = isinstance(numbers, (list, tuple)) and len(numbers) == len(data)
        if one_each and all(type(number) is int for number in numbers):
            return list(numbers)
    return None


def _feature_names(data: Any) -> Sequence[str] | None:
    """Return the label names of a Hugging Face data set; None if several columns may hold the labels."""
    features = getattr(data, "features", None)
    if not isinstance(features, dict):
        return None
    columns = {name: names for name, column in features.items() if (names := getattr(column, "names", None))}
    found = [names for name, names in columns.items() if name in LABELS] or [*columns.values()]
    return found[0] if len(found) == 1 else None


def likely_scales(
    model: nn.Module, images: Tensor, of_data: Iterable[Scale], holders: Iterable[Any] = ()
) -> Iterator[Scale]:
    """Yield the normalizations that the images, (n, C, H, W), may have undergone, the likeliest first.

    Those of the holders and the model may be applied later, in forward; they are kept if the images fit them.
    """
    yield from of_data
    yield UNSCALED
    if bool((images == images.round()).all()):
        yield BYTES
    yield from (one for one in scales_in(*holders) if fits(images, one, whole=True))
    if fits(images, declared := normalization(model), whole=True):
        yield declared


def scales_in(*holders: Any) -> Iterator[Scale]:
    """Yield mean and std of held objects that have them, such as torchvision, timm or kornia transforms."""
    yield from filter(None, map(_scale, held_by(*holders, whole=_scale)))


def _scale(value: Any) -> Scale | None:
    """Return the mean and std of an object, or of its flags or buffers, as in kornia's augmentations."""
    kept = attributes(value)
    options = [one for one in (kept, kept.get("flags"), kept.get("_buffers")) if isinstance(one, Mapping)]
    for named in options if kept.get("do_normalize", True) else ():
        for names in _SCALE_NAMES:
            mean, std = (numbers_in(named.get(name)) for name in names)
            if mean and std and min(std) > 0:
                return mean, std
    return None


def numbers_in(value: Any) -> tuple[float, ...]:
    """Return one number, or those in a list, an array or a tensor; empty if there are others."""
    with suppress(TypeError, ValueError, RuntimeError):
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten()
        return tuple(numbers.tolist()) if len(numbers) <= _CHANNELS and not isinstance(value, bool) else ()
    return ()


def held_by(*values: Any, whole: Callable[[Any], Any] = lambda one: False) -> Iterator[Any]:
    """Yield objects and their parts, breadth first and each once; `whole` objects are not taken apart.

    No properties are computed, since those of a data set may be slow.
    """
    level, seen = list(values), set[int]()
    for _ in range(_DEEP):
        new = {id(one): one for one in level if id(one) not in seen and not _is_opaque(one)}
        seen.update(new)
        yield from new.values()
        level = [part for one in new.values() if not whole(one) for part in _parts(one)]


def attributes(value: Any) -> Mapping[str, Any]:
    """Return the stored attributes, not properties."""
    with suppress(AttributeError):
        return dict(object.__getattribute__(value, "__dict__"))
    return {}


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list, tuple, set)) and len(value) <= _MOST:
        yield from dict.values(value) if isinstance(value, dict) else value
    if type(value) in (dict, list, tuple, set):
        return
    if isinstance(value, MethodType):
        yield value.__self__
    yield from attributes(value).values()
    for kind in type(value).__mro__:  # class attributes
        if kind.__module__.split(".")[0] not in _LIBRARIES:
            yield from vars(kind).values()


def _is_opaque(value: Any) -> bool:
    """Return True for objects that are not searched: plain values, models, and trainers."""
    if isinstance(value, nn.Module):
        return any(True for _ in value.parameters())
    trains = callable(getattr(type(value), "fit", None))  # trainers also hold the training data
    return trains or isinstance(value, _OPAQUE)
