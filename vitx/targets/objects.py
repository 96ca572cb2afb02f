"""The objects of a detector: how sure each query is of one, and where its box lies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.targets.outputs import part

# How the outputs are named whose last class stands for "no object".
_WITH_NONE = "Detr", "Yolos", "TableTransformer"


def real_classes(logits: Tensor, model: nn.Module | None, output: Any) -> int:
    """Returns how many classes the queries have, (B, Q, classes), but for a last one that is "no object"."""
    width = int(logits.shape[-1])
    declared = getattr(getattr(model, "config", None), "num_labels", None)
    if declared is None:
        return width - type(output).__name__.startswith(_WITH_NONE)
    return width - int(declared == width - 1)


def probabilities(logits: Tensor, classes: int) -> Tensor:
    """Returns the probability of each class, (..., classes): by a softmax if there is one more for none."""
    logits = logits.detach().float()
    found = logits.softmax(-1) if classes < logits.shape[-1] else logits.sigmoid()
    return found[..., :classes]


def certainty(logits: Tensor, classes: int) -> Tensor:
    """Returns the probability of the best class of each query, (B, Q)."""
    return probabilities(logits, classes).amax(-1)


def objects_of(output: Any, model: nn.Module | None) -> Tensor | None:
    """Returns how sure each query is of an object, (B, Q); None where the output has no boxes of objects."""
    logits = part(output, "logits")
    if logits is None or logits.ndim != 3 or part(output, "pred_boxes") is None:
        return None
    return certainty(logits, real_classes(logits, model, output))


def boxes_of(output: Any, queries: Tensor, size: Sequence[int]) -> Tensor | None:
    """Returns the box of one query of each image, (B, 4): x0, y0, x1, y1 in pixels; None: it has none."""
    boxes = part(output, "pred_boxes")
    if boxes is None or boxes.ndim != 3 or len(size) != 2:
        return None
    height, width = size
    centre, extent = boxes.detach().float()[torch.arange(len(boxes)), queries].split(2, -1)
    corners = torch.cat([centre - extent / 2, centre + extent / 2], -1)
    return corners * corners.new_tensor([width, height, width, height])


def best_queries(found: Any, count: int, *, no_object: bool | None = None) -> Tensor:
    """Finds the queries that are surest of an object.

    Args:
        found: an explanation of a detector, what the detector puts out, or its logits, (B, queries, classes).
        count: how many.
        no_object: whether the last class stands for "no object", as in DETR and YOLOS, and probabilities come
            from a softmax; else they come from a sigmoid. Of an explanation it is known.

    Returns:
        (B, count) long, the surest one first.

    Raises:
        VitxError: There are no queries or fewer; or of bare logits it matters what the last class is.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
        >>> best_queries(logits, 2, no_object=True)
        tensor([[2, 1]])
    """
    sure = _sure(found, count, no_object)
    if count < 1 or sure.shape[1] < count:
        raise VitxError(f"{count} objects of {sure.shape[1]} queries cannot be found: ask for 1 to as many")
    return sure.topk(count).indices


def _sure(found: Any, count: int, no_object: bool | None) -> Tensor:
    known: Tensor | None = getattr(found, "objects", None)
    if known is not None:
        return known
    logits = found if isinstance(found, Tensor) else part(found, "logits")
    if logits is None or logits.ndim != 3:
        raise VitxError("there are no queries: give the explanation, or the output, of a detector")
    if no_object is None and not isinstance(found, Tensor):
        return certainty(logits, real_classes(logits, None, found))
    tries = [
        certainty(logits, logits.shape[-1] - none) for none in (True, False) if no_object in (none, None)
    ]
    order = [one.topk(min(count, one.shape[1])).indices for one in tries]
    if any(not one.equal(order[0]) for one in order):
        raise VitxError(
            "it depends on the last class which queries are the surest: say whether it is no object, with "
            "no_object=True or False, or give the explanation in place of its logits"
        )
    return tries[0]
