"""Outputs of a model: their parts, and their kind, inferred from the labels."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor, nn

# Shares are numbers in [0, 1], computed from the logits by a sigmoid.
Kind = Literal["class", "classes", "numbers", "shares", "features"]
_QUERIES = ("class_queries_logits", "masks_queries_logits"), ("logits", "pred_masks")


def kind_of(
    logits: Tensor, labels: Tensor | None, widths: range | None = None, declared: frozenset[int] = frozenset()
) -> Kind:
    """Return the kind of an output, (B, ...): scores of classes, unless its labels, (B, ...), say otherwise.

    "class" is one class per image, also if a single logit decides between two; "classes" are any number of
    them (multi-label); "numbers" are those of a regression. `widths` are the plausible numbers of outputs,
    given the data set, and `declared` the numbers of classes that parts of the model declare.
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
    """Distinguish binary labels from shares, which the same loss may take: only shares lie in (0, 1)."""
    if labels is None or kind not in ("class", "shares"):
        return kind
    if kind == "shares":
        return kind if not _yes_or_no(labels) else "class" if width == 1 else "classes"
    between = width == 1 and labels.is_floating_point() and not _yes_or_no(labels)
    return "shares" if between else kind


def declared_classes(model: nn.Module) -> Iterator[int]:
    """Yield the number of classes that each part of a model declares, as in timm and Hugging Face."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for count in (getattr(module, "num_classes", None), getattr(config, "num_labels", None)):
            if isinstance(count, int) and count > 0:
                yield count


def known(labels: Tensor) -> Tensor:
    """Return a mask of the labels that are present: NaN and values below 0 mean that there is none."""
    return labels >= 0


def beyond(labels: Tensor | None, outputs: int) -> bool:
    """Return whether some label, (B,), is too large for the outputs; a single output takes any."""
    return labels is not None and labels.ndim == 1 and 1 < outputs <= int(labels.max())


def classes_in(labels: Tensor | None, outputs: int) -> Tensor | None:
    """Return the class of each image, (B,), from labels (B,) or (B, 1), or one-hot ones; None for others."""
    if labels is not None and labels.ndim == 2 and labels.shape[1] in (1, outputs):
        labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(1)
    if labels is None or labels.ndim != 1 or (labels.is_floating_point() and outputs > 1):
        return None
    return labels.long()


def _yes_or_no(labels: Tensor) -> bool:
    """Return whether all labels that are present are 0 or 1."""
    return _binary(labels[known(labels)])


def _binary(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all())


def part(output: Any, *names: str) -> Tensor | None:
    """Return the first tensor that an output holds under one of these names; None if there is none."""
    keyed = isinstance(output, Mapping)
    held = (output.get(name) if keyed else getattr(output, name, None) for name in names)
    return next((one for one in held if isinstance(one, Tensor)), None)


def mask_queries(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the logits, (B, Q, classes and "none"), and the masks, (B, Q, h, w), of mask queries."""
    for names in _QUERIES:
        classes, masks = (part(output, name) for name in names)
        if classes is not None and masks is not None:
            return classes, masks
    return None


def main(output: Any) -> Tensor | None:
    """Return the tensor to score: the output itself, its logits, or the first tensor in it; else None."""
    if isinstance(output, Tensor):
        return output
    if (found := part(output, "logits", "out")) is not None:
        return found
    if not isinstance(output, (Mapping, tuple, list)):
        return None
    parts = output.values() if isinstance(output, Mapping) else output
    return next((one for one in parts if isinstance(one, Tensor) and one.ndim), None)  # a loss is a scalar


def described(output: Any) -> str:
    """Describe an output, and suggest a target that fits."""
    if (queries := mask_queries(output)) is not None:
        classes, masks = (tuple(one.shape) for one in queries)
        return f"the output is mask queries, classes {classes} and masks {masks}: use vitx.targets.region"
    found = main(output)
    if found is None:
        return f"the output is {type(output).__name__}, without logits: use vitx.targets.token"
    fits = {
        3: "use vitx.targets.query for one of its rows, or vitx.targets.region if these are patches",
        4: "use vitx.targets.region for a part of the picture",
    }.get(found.ndim, "ask about a class")
    if part(output, "pred_boxes") is not None:
        fits = "use vitx.targets.query for one object"
    return f"the output is {tuple(found.shape)}: {fits}"
