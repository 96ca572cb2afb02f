"""The objects of a detector: the confidence and the box of each query, and a query as a target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.models.outputs import described, main, part
from vitx.targets.question import Answers, Asked, Question, for_each, numbers


class Query(Question):
    """One object of a detector such as DETR, YOLOS or RT-DETR: the logit of its class.

    Args:
        index: the index of the query, or one index per image; see `best_queries`.
        cls: the class; by default the class with the highest logit, other than "no object".

    Raises:
        VitxError: `index` is neither an integer nor a list of integers. When it is put to a model: there is
            no such query or class, or the output has no queries.

    Example:
        >>> query([3, 7]).index
        tensor([3, 7])
    """

    rows = "index"

    def __init__(self, index: int | Sequence[int] | Tensor, cls: int | None = None) -> None:
        form = "a query is an integer, or one for each image"
        found = numbers(index, form)
        if found.is_floating_point() or found.ndim > 1 or not found.numel():
            raise VitxError(f"{form}, found {index!r}")
        self.index, self.cls = found.view(-1), cls

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Ask for the class of each image's query."""
        index = for_each(self.index.to(images.device), len(images), "queries")

        def answers(output: Any) -> Answers:
            rows, asked, classes = self._found(output, model, index)
            both = rows, probabilities(rows, classes)
            scores, sure = (one.gather(1, asked[:, None])[:, 0] for one in both)
            names = declared_names(model)
            named = [names[cls] if names else f"class {cls}" for cls in asked.tolist()]
            queries = zip(index.tolist(), named, sure.tolist(), strict=True)
            said = [f"query {query}: {name} {share:.0%}" for query, name, share in queries]
            return Answers(scores, said, boxes_of(output, index, images.shape[2:]))

        return Asked(images, answers)

    def _found(self, output: Any, model: nn.Module, index: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the logits, (B, outputs), and class, (B,), of each image's query; and the class count."""
        logits = main(output)
        if logits is None or logits.ndim != 3:
            raise VitxError(described(output))
        queries, classes = logits.shape[1], real_classes(logits, model)
        if not 0 <= int(index.min()) <= int(index.max()) < queries:
            said = self.index.tolist()
            raise VitxError(f"query {said} is out of range: the model has queries 0 to {queries - 1}")
        if self.cls is not None and not 0 <= self.cls < classes:
            raise VitxError(f"class {self.cls} is out of range: the model has classes 0 to {classes - 1}")
        rows = logits[torch.arange(len(logits), device=logits.device), index]
        best = rows.detach()[:, :classes].argmax(1)
        return rows, best if self.cls is None else torch.full_like(best, self.cls), classes


query = Query


def best_queries(found: Any, count: int, *, no_object: bool | None = None) -> Tensor:
    """Find the queries with the most confident objects.

    Args:
        found: an explanation of a detector, or its logits, (B, queries, classes).
        count: the number of queries to return.
        no_object: needed for logits that are not from an explanation. True if the last class is "no object",
            as in DETR and YOLOS, and probabilities come from a softmax; False if they come from a sigmoid.

    Returns:
        (B, count) long, the most confident query first.

    Raises:
        VitxError: There are no queries, or fewer than `count`; or the meaning of the last class is unknown.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0, 3.0], [2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
        >>> best_queries(logits, 2, no_object=True)
        tensor([[2, 1]])
    """
    sure: Tensor | None = getattr(found, "objects", None)
    if sure is None:
        if not isinstance(found, Tensor) or found.ndim != 3:
            raise VitxError("there are no queries: give the explanation of a detector")
        if no_object is None:
            raise VitxError(
                'it is unknown whether the last class of these logits is "no object": give the explanation, '
                "or no_object=True or False"
            )
        sure = probabilities(found, found.shape[-1] - no_object).amax(-1)
    if not 1 <= count <= sure.shape[1]:
        raise VitxError(f"cannot choose {count} of {sure.shape[1]} queries: ask for 1 to {sure.shape[1]}")
    return sure.topk(count).indices


def real_classes(logits: Tensor, model: nn.Module) -> int:
    """Return the number of classes in the logits of queries, (B, Q, classes), without "no object"."""
    width = int(logits.shape[-1])
    return width - int(getattr(getattr(model, "config", None), "num_labels", None) == width - 1)


def probabilities(logits: Tensor, classes: int) -> Tensor:
    """Return class probabilities, (..., classes): by softmax if "no object" has a logit, else by sigmoid."""
    logits = logits.detach().float()
    found = logits.softmax(-1) if classes < logits.shape[-1] else logits.sigmoid()
    return found[..., :classes]


def objects_of(output: Any, model: nn.Module) -> Tensor | None:
    """Return the confidence of each query in its object, (B, Q); None if the output has no boxes."""
    logits = part(output, "logits")
    if logits is None or logits.ndim != 3 or part(output, "pred_boxes") is None:
        return None
    return probabilities(logits, real_classes(logits, model)).amax(-1)


def boxes_of(output: Any, queries: Tensor, size: Sequence[int]) -> Tensor | None:
    """Return the box of one query per image, (B, 4): x0, y0, x1, y1 in pixels; None if there are no boxes."""
    boxes = part(output, "pred_boxes")
    if boxes is None or boxes.ndim != 3 or len(size) != 2:
        return None
    height, width = size
    center, extent = boxes.detach().float()[torch.arange(len(boxes)), queries].split(2, -1)
    corners = torch.cat([center - extent / 2, center + extent / 2], -1)
    return corners * corners.new_tensor([width, height, width, height])
