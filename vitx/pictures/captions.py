"""Captions: the prediction for an image, and whether it is correct."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from vitx.models.classes import known_class_names, short
from vitx.models.outputs import Kind, beyond, classes_in, kind_of
from vitx.models.outputs import known as known_labels

Names = Sequence[str] | None  # class names, in the order of the logits

_AND = " + "  # separator of class names
_SHORTEST, _READABLE = 4, 12  # minimum letters of a name: in any case, and to stay readable
_MOST_LINES = 4
_ROUNDED = 1e-3
_DIGITS = 3  # significant digits of the largest number
_BREAK = re.compile(r"(?<=, )|(?<=\+ )")  # where a line may end


@dataclass(frozen=True)
class Caption:
    """The caption of one image."""

    prediction: str  # one or several classes or numbers; empty if nothing is known
    probability: float | None = None  # of the class, in [0, 1], if there is a single one
    label: str | None = None  # the ground truth, in the format of the prediction
    right: bool | None = None  # None if that is unknown, or not a matter of right or wrong

    def lines(self, fits: Callable[[str], bool]) -> list[str]:
        """Return the caption in as few lines as keep it readable, each of which `fits` accepts.

        Names are shortened in the middle, the label last. A count may replace several predicted classes.
        """
        names = f"{self.prediction}{_AND}{self.label or ''}".split(_AND)
        lengths = range(max(_SHORTEST, *map(len, names)), _SHORTEST - 1, -1)
        tries = [replace(self, prediction=_shortened(self.prediction, length)) for length in lengths]
        readable = tries[: max(1, len(lengths) - (_READABLE - _SHORTEST))]
        if _AND in self.prediction:
            tries.append(replace(self, prediction=f"{len(self.prediction.split(_AND))} classes"))
        tries += [replace(tries[-1], label=self.label and _shortened(self.label, n)) for n in lengths]
        counts = range(1, _MOST_LINES + 1)
        for most, one in [*product(counts, readable), *product(counts[-1:], tries)]:
            lines = _wrapped(str(one), fits)
            if len(lines) <= most and all(map(fits, lines)):
                break
        return lines[:_MOST_LINES]

    def __str__(self) -> str:
        said = self.prediction if self.probability is None else f"{self.prediction} {self.probability:.0%}"
        if self.label is None:
            return said
        mark = {True: "\N{CHECK MARK} ", False: "\N{BALLOT X} ", None: ""}[self.right]
        return f"{mark}{said}" if self.right else f"{mark}{said}, is {self.label}"


def captions_of(
    logits: Tensor, labels: Tensor | None = None, class_names: Names = None, kind: Kind | None = None
) -> list[Caption]:
    """Return the captions of images.

    The labels, (B,), (B, 1) or (B, classes), determine what the logits, (B, classes) or (B,), are: one class
    per image (softmax; sigmoid of a single logit), also if there are no labels; 0 or 1 for each class
    (multi-label, sigmoid); or numbers (regression), written with as many decimals as the labels need.
    Features have an empty caption. Classes without names are numbered.

    Example:
        >>> [str(caption) for caption in captions_of(torch.tensor([[0.0, 3.0]]), class_names=["cat", "dog"])]
        ['dog 95%']
    """
    kind = kind or kind_of(logits, labels)
    if kind == "features" or logits.ndim not in (1, 2):
        return [Caption("")] * len(logits)
    logits = logits.float().reshape(len(logits), -1)
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    labels = None if beyond(labels, logits.shape[1]) else labels  # not classes of this model
    if kind in ("numbers", "shares"):
        return _numbers(logits.sigmoid() if kind == "shares" else logits, labels)
    if kind == "classes" and labels is not None and labels.shape == logits.shape:
        return _several_classes(logits, labels, class_names)
    return _one_class(logits, classes_in(labels, logits.shape[1]), class_names)


def captions_said(logits: Tensor, said: Sequence[str] | None, class_names: Names = None) -> list[Caption]:
    """Return the captions that a target gives to the images, else those of `captions_of`."""
    if said is not None:
        return [Caption(one) for one in said]
    return captions_of(logits, class_names=_named(logits, class_names))


def classes_said(logits: Tensor, target: Tensor | None, class_names: Names = None) -> list[str | None]:
    """Return the class that the map of each image explains, else the predicted one."""
    names = _named(logits, class_names)
    if target is None:
        return classes_of(captions_of(logits, class_names=names))
    return [class_name(one, names) for one in target.tolist()]


def _named(logits: Tensor, class_names: Names) -> Names:
    """Return the given names of the classes or, for 1,000 classes without names, those of ImageNet."""
    if class_names is None and logits.ndim == 2 and (known := known_class_names(logits.shape[1])):
        return [short(name) for name in known]
    return class_names


def classes_of(captions: Sequence[Caption]) -> list[str | None]:
    """Return the predicted class of each caption; None if it is not a single class."""
    return [one.prediction if one.probability is not None else None for one in captions]


def _numbers(numbers: Tensor, labels: Tensor | None) -> list[Caption]:
    """Format all numbers alike, to the scale of the labels, which does not change as the model learns."""
    largest = float((numbers if labels is None else labels.float()).abs().max())
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(largest))) if largest > 0 else _DIGITS - 1
    form = f".{decimals}f" if decimals <= 2 * _DIGITS else f".{_DIGITS - 1}e"

    def said(row: Tensor) -> str:
        return ", ".join(f"{number:{form}}" for number in row.flatten().tolist())

    known = [None] * len(numbers) if labels is None else map(said, labels)
    return [Caption(said(found), label=label) for found, label in zip(numbers, known, strict=True)]


def _one_class(logits: Tensor, labels: Tensor | None, class_names: Names) -> list[Caption]:
    # Outputs that are at least 0 and sum to 1 are probabilities already: the model applied a softmax.
    made = (logits >= 0).all() and ((logits.sum(1) - 1).abs() < _ROUNDED).all()
    shares = logits if made and logits.shape[1] > 1 else shares_of(logits)
    probability, prediction = shares.max(-1)
    truth = [-1] * len(logits) if labels is None else labels.tolist()  # below 0: no label
    found = []
    for index, share, label in zip(prediction.tolist(), probability.tolist(), truth, strict=True):
        known = (class_name(label, class_names), index == label) if label >= 0 else ()
        found.append(Caption(class_name(index, class_names), share, *known))
    return found


def shares_of(logits: Tensor) -> Tensor:
    """Return class probabilities, (..., classes); for a single logit, those of classes 0 and 1."""
    if logits.shape[-1] > 1:
        return logits.float().softmax(-1)
    return torch.cat([-logits, logits], -1).float().sigmoid()


def _several_classes(logits: Tensor, labels: Tensor, class_names: Names) -> list[Caption]:
    def names(present: Tensor) -> str:
        places = present.nonzero()[:, 0].tolist()
        return _AND.join(class_name(index, class_names) for index in places) or "none"

    found = []
    for predicted, true, known in zip(logits > 0, labels >= 0.5, known_labels(labels), strict=True):
        truth = (names(true), bool((predicted == true)[known].all())) if known.any() else ()
        found.append(Caption(names(predicted), None, *truth))
    return found


def _shortened(names: str, length: int) -> str:
    """Shorten each of several names in the middle, since names differ more at their ends."""
    head, tail = length - length // 2, length // 2 - 1
    return _AND.join(
        name if len(name) <= length else f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"
        for name in names.split(_AND)
    )


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text between names where it does not fit."""
    lines = [""]
    for piece in _BREAK.split(text):
        if lines[-1] and not fits(f"{lines[-1]}{piece}".rstrip()):
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def class_name(index: int, class_names: Names) -> str:
    """Return the name of a class, or its index if it has none."""
    return str(class_names[index]) if class_names and 0 <= index < len(class_names) else str(index)
