"""Kinds of output of a model: scores of classes, numbers or features, as the labels tell."""

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor, nn

# Shares are numbers in [0, 1]: a sigmoid makes them of the logits.
Kind = Literal["class", "classes", "numbers", "shares", "features"]


def kind_of(
    logits: Tensor, labels: Tensor | None, widths: range | None = None, declared: frozenset[int] = frozenset()
) -> Kind:
    """Tell what an output is.

    Args:
        logits: (B, ...), what the model put out.
        labels: (B, ...), or None: then it is taken for scores of classes. Whole numbers below 0 are none.
        widths: how many outputs fit the classes of the data set; None if these are not known.
        declared: how many classes a part of the model declares: an output of that width is of classes.

    Returns:
        "class": one of several for each image, also by one logit; "classes": any number of them
        (multi-label); "numbers" (regression); or "features".

    Example:
        >>> import torch
        >>> kind_of(torch.rand(2, 10), torch.tensor([3, 9]))
        'class'
        >>> kind_of(torch.rand(2, 384), torch.tensor([3, 9]), range(10, 11))
        'features'
        >>> kind_of(torch.rand(2, 1), torch.tensor([3.5, 9]))
        'numbers'
    """
    if logits.ndim not in (1, 2):
        return "features"
    width = 1 if logits.ndim == 1 else logits.shape[1]
    if labels is None:
        return "class"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[1] == width:
        one = bool(((labels.float().sum(1) - 1).abs() < 1e-3).all() and (labels >= 0).all())
        return "class" if one else "classes" if _yes_or_no(labels) else "numbers"
    if labels.ndim != 1 or (width > 1 and width in declared):
        return "class"
    other: Kind = "numbers" if width == 1 else "features"
    if labels.is_floating_point() and not (width == 1 and _binary(labels)):
        return other
    largest = int(labels[known(labels)].max()) if known(labels).any() else -1
    if largest >= max(width, 2):
        return other
    contradicts = widths is not None and max(width, 2) not in widths and largest < widths.start
    return "features" if contradicts else "class"


def told_apart(kind: Kind, width: int, labels: Tensor | None) -> Kind:
    """Tell yes and no from shares, which a loss may take alike: some true shares lie between 0 and 1."""
    if labels is None or kind not in ("class", "shares"):
        return kind
    if kind == "shares":
        return kind if not _yes_or_no(labels) else "class" if width == 1 else "classes"
    between = width == 1 and labels.is_floating_point() and not _yes_or_no(labels)
    return "shares" if between else kind


def declared_classes(model: nn.Module) -> Iterator[int]:
    """Yield the numbers of classes that parts of a model declare, as timm's and Hugging Face's do."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for count in (getattr(module, "num_classes", None), getattr(config, "num_labels", None)):
            if isinstance(count, int) and count > 0:
                yield count


def what_fits(shape: Sequence[int], *, boxes: bool = False) -> str:
    """Say which target fits an output of this shape, with boxes of objects or without."""
    if boxes:
        return "use vitx.targets.query for one object"
    if len(shape) == 4:
        return "use vitx.targets.region for a part of the picture"
    if len(shape) == 3:
        return "use vitx.targets.query for one of its rows, or vitx.targets.region if these are patches"
    return "give a class, as target=3"


def known(labels: Tensor) -> Tensor:
    """Return which labels of classes say something: NaN and what is below 0 stand for none."""
    return labels >= 0


def beyond(labels: Tensor | None, outputs: int) -> bool:
    """Return whether some labels, (B,), name a class that several outputs have not."""
    return labels is not None and labels.ndim == 1 and 1 < outputs <= int(labels.max())


def _yes_or_no(labels: Tensor) -> bool:
    """Return whether all labels that say something are 0 or 1."""
    return _binary(labels[known(labels)])


def _binary(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all())
