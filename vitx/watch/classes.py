"""Names and labels of classes, which a data set tells without loading its images."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import Subset, TensorDataset

from vitx.errors import VitxError
from vitx.watch.batches import LABELS

_NAMES = ("classes", "class_to_idx", "label_to_id", "class_names")
_MOST_READ = 2000  # samples, in search of classes where the data set does not tell them


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
    """Return the names of classes that a list, an array or a mapping holds; None: it is none of these.

    They are in the order of the classes, also as tuples of synonyms; or a mapping tells the number of each.
    """
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


def class_counts(data: Any, names: Sequence[str] | None) -> range | None:
    """Return how many outputs a model of these classes may have; None where that is not known.

    There are as many as names; where the data set only lists its labels, most outputs must have one.
    """
    if names:
        return range(len(names), len(names) + 1)
    count = max((hasattr(data, "__len__") and _labels(data)) or [-1]) + 1
    return range(count, 2 * count + 1) if count else None


def one_of_each_class(
    data: Any, count: int, read_labels: Callable[[Sequence[int]], Iterable[int | None]]
) -> tuple[int, ...]:
    """Return the place of a sample of each class, in their order; of more than `count`, evenly spaced ones.

    Where the data set does not list their classes, those of some places are read.
    """
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
    if isinstance(data, TensorDataset):
        return _whole_numbers(data.tensors[1], len(data)) if len(data.tensors) > 1 else None
    listed = (getattr(data, name, None) for name in ("targets", "labels", "_labels"))
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
