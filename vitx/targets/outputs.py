"""The parts of what a model puts out, by what they are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitx.models.outputs import what_fits

_QUERIES = ("class_queries_logits", "masks_queries_logits"), ("logits", "pred_masks")


def part(output: Any, name: str) -> Tensor | None:
    """Return the tensor of this name in an output object; None where there is none."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def mask_queries(output: Any) -> tuple[Tensor, Tensor] | None:
    """Return the classes, (B, Q, classes and none), and the masks, (B, Q, h, w), of mask queries."""
    for names in _QUERIES:
        classes, masks = (part(output, name) for name in names)
        if classes is not None and masks is not None:
            return classes, masks
    return None


def main(output: Any) -> Tensor | None:
    """Return what is scored: the output itself, its logits, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        if (found := part(output, name)) is not None:
            return found
    if not isinstance(output, (Mapping, tuple, list)):
        return None
    parts = output.values() if isinstance(output, Mapping) else output
    return next((one for one in parts if isinstance(one, Tensor) and one.ndim), None)  # a loss has none


def described(output: Any) -> str:
    """Say what an output is, and which target fits."""
    if (queries := mask_queries(output)) is not None:
        classes, masks = (tuple(one.shape) for one in queries)
        return f"the output is mask queries, classes {classes} and masks {masks}: use vitx.targets.region"
    found = main(output)
    if found is None:
        return f"the output is {type(output).__name__}, without logits: use vitx.targets.token"
    boxes = part(output, "pred_boxes") is not None
    return f"the output is {tuple(found.shape)}: {what_fits(found.shape, boxes=boxes)}"
