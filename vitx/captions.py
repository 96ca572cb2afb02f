"""What is said of an image, of what a model puts out and of what is true."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_AND = " + "  # between several classes
_SHORTEST = 4  # letters of a name


@dataclass(frozen=True)
class Caption:
    """What is said of one image.

    Attributes:
        prediction: a class, several, or a number; empty if nothing is known.
        probability: of the class, in [0, 1]; None where there is no single one.
        label: what is true, in the words of the prediction.
        right: whether the prediction is true; None where that is not known, or no yes or no.
    """

    prediction: str
    probability: float | None = None
    label: str | None = None
    right: bool | None = None

    def fitted(self, fits: Callable[[str], bool]) -> str:
        """Returns the caption, shortened until it fits: what is true last, as the picture cannot tell it.

        Names are shortened in the middle; several that were predicted give way to their number.
        """
        predicted = self.prediction.split(_AND)
        longest = max(map(len, f"{self.prediction}{_AND}{self.label}".split(_AND)))
        lengths = range(max(longest, _SHORTEST), _SHORTEST - 1, -1)
        tries = [replace(self, prediction=_shortened(self.prediction, length)) for length in lengths]
        if len(predicted) > 1:
            tries.append(replace(self, prediction=f"{len(predicted)} classes"))
        tries += [replace(tries[-1], label=self.label and _shortened(self.label, n)) for n in lengths]
        said = map(str, tries)
        return next(filter(fits, said), str(tries[-1]))

    def __str__(self) -> str:
        said = self.prediction if self.probability is None else f"{self.prediction} {self.probability:.0%}"
        if self.label is None:
            return said
        mark = {True: "\N{CHECK MARK} ", False: "\N{BALLOT X} ", None: ""}[self.right]
        return f"{mark}{said}" if self.right else f"{mark}{said}, is {self.label}"


def captions_of(
    logits: Tensor, labels: Tensor | None = None, class_names: Sequence[str] | None = None
) -> list[Caption]:
    """Says what was predicted, and whether it is right.

    The labels tell what the logits are: a class for each image (softmax, or sigmoid if there is but one
    logit, then also as 0.0 or 1.0), 0 or 1 for each class (multi-label, sigmoid), or numbers (regression).

    Args:
        logits: (B, classes), or (B,).
        labels: (B,), (B, 1) or (B, classes), or None: then each image has one class.
        class_names: by default the numbers of the classes.

    Example:
        >>> [str(caption) for caption in captions_of(torch.tensor([[0.0, 3.0]]), class_names=["cat", "dog"])]
        ['dog 95%']
        >>> several = torch.tensor([[1.0, 1.0]])
        >>> str(captions_of(torch.tensor([[2.0, -1.0]]), several, ["cat", "dog"])[0])
        '\N{BALLOT X} cat, is cat + dog'
        >>> str(captions_of(torch.tensor([[0.71]]), torch.tensor([0.5]))[0])
        '0.71, is 0.5'
    """
    logits = logits.float()
    if logits.ndim == 1:
        logits = logits[:, None]
    if logits.ndim != 2:
        return [Caption("")] * len(logits)
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels is not None and labels.ndim == 2 and labels.shape == logits.shape:
        if (labels.sum(1) != 1).any():
            return _several_classes(logits, labels > 0, class_names)
        labels = labels.argmax(1)
    if labels is not None and labels.ndim == 1 and labels.is_floating_point():
        if logits.shape[1] > 1:
            labels = None
        elif ((labels == 0) | (labels == 1)).all():  # as binary_cross_entropy_with_logits takes them
            labels = labels.long()
        else:
            rows = zip(logits[:, 0].tolist(), labels.tolist(), strict=True)
            return [Caption(f"{number:.3g}", label=f"{label:.3g}") for number, label in rows]
    return _one_class(logits, labels if labels is None or labels.ndim == 1 else None, class_names)


def _one_class(logits: Tensor, labels: Tensor | None, class_names: Sequence[str] | None) -> list[Caption]:
    shares = (
        logits.softmax(-1) if logits.shape[1] > 1 else torch.cat([1 - logits.sigmoid(), logits.sigmoid()], 1)
    )
    probability, prediction = shares.max(-1)
    truth: list[int | None] = [None] * len(logits) if labels is None else labels.tolist()
    found = []
    for index, share, label in zip(prediction.tolist(), probability.tolist(), truth, strict=True):
        name = None if label is None else class_name(label, class_names)
        found.append(
            Caption(class_name(index, class_names), share, name, None if label is None else index == label)
        )
    return found


def _several_classes(logits: Tensor, labels: Tensor, class_names: Sequence[str] | None) -> list[Caption]:
    def names(present: Tensor) -> str:
        return (
            _AND.join(class_name(index, class_names) for index in present.nonzero()[:, 0].tolist()) or "none"
        )

    predicted = logits > 0
    rows = zip(predicted, labels, strict=True)
    return [Caption(names(p), None, names(t), bool((p == t).all())) for p, t in rows]


def _shortened(names: str, length: int) -> str:
    """Shortens each of several names in its middle, which tells fewer of them apart than their ends do."""
    head, tail = length - length // 2, length // 2 - 1
    return _AND.join(
        name if len(name) <= length else f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"
        for name in names.split(_AND)
    )


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """Returns what to call a class: its number where it has no name."""
    return str(class_names[index]) if class_names and 0 <= index < len(class_names) else str(index)
