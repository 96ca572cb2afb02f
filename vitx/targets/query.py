"""The objects of a detector: the confidence and the box of each query, and a query as a target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.models.outputs import described, main, part
from vitx.models.prediction import check_range, whole_numbers
from vitx.targets.question import Answers, Asked, Question, for_each


class Query(Question):
    """One object of a detector such as DETR, YOLOS or RT-DETR: the logit of its class.

    Args:
        index: the index of the query, or one index per image; see `best_queries`.
        cls: the class; by default the class with the highest logit, other than "no object".
    """

    rows = "index"

    def __init__(self, index: int | Sequence[int] | Tensor, cls: int | None = None) -> None:
        found = whole_numbers(index, "a query is an integer, or one for each image")
        self.index, self.cls = found.view(-1), cls

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Ask for the class of each image's query."""
        index = for_each(self.index.to(images.device), len(images), "queries")

        def answers(output: Any) -> Answers:
            rows = self._rows(output, index)
            shares = probabilities(rows, model)
            asked = self._classes(rows[:, : shares.shape[1]])
            scores, sure = (one.gather(1, asked[:, None])[:, 0] for one in (rows, shares))
            names = declared_names(model)
            named = [names[cls] if names else f"class {cls}" for cls in asked.tolist()]
            queries = zip(index.tolist(), named, sure.tolist(), strict=True)
            said = [f"query {query}: {name} {share:.0%}" for query, name, share in queries]
            return Answers(scores, said, boxes_of(output, index, images.shape[2:]))

        return Asked(images, answers)

    def _rows(self, output: Any, index: Tensor) -> Tensor:
        """Return the logits of each image's query, (B, outputs)."""
        logits = main(output)
        if logits is None or logits.ndim != 3:
            raise VitxError(described(output))
        check_range("query", index, "queries", logits.shape[1])
        return logits[torch.arange(len(logits), device=logits.device), index]

    def _classes(self, logits: Tensor) -> Tensor:
        """Return the class to explain for each image, (B,)."""
        best = logits.detach().argmax(1)
        asked = best if self.cls is None else torch.full_like(best, self.cls)
        check_range("class", asked, "classes", logits.shape[1])
        return asked


query = Query


def best_queries(found: Any, count: int) -> Tensor:
    """Return the queries with the surest objects in a detector's explanation, (B, count), surest first."""
    sure: Tensor | None = getattr(found, "objects", None)
    if sure is None:
        raise VitxError("there are no queries: give the explanation of a detector")
    if not 1 <= count <= sure.shape[1]:
        raise VitxError(f"cannot choose {count} of {sure.shape[1]} queries: ask for 1 to {sure.shape[1]}")
    return sure.topk(count).indices


def probabilities(logits: Tensor, model: nn.Module) -> Tensor:
    """Return class probabilities, (..., classes): by softmax if "no object" has a logit, else by sigmoid."""
    logits = logits.detach().float()
    if getattr(getattr(model, "config", None), "num_labels", None) == logits.shape[-1] - 1:
        return logits.softmax(-1)[..., :-1]
    return logits.sigmoid()


def objects_of(output: Any, model: nn.Module) -> Tensor | None:
    """Return the confidence of each query in its object, (B, Q); None if the output has no boxes."""
    logits = part(output, "logits")
    if logits is None or logits.ndim != 3 or part(output, "pred_boxes") is None:
        return None
    return probabilities(logits, model).amax(-1)


def boxes_of(output: Any, queries: Tensor, size: Sequence[int]) -> Tensor | None:
    """Return the box of one query per image, (B, 4): x0, y0, x1, y1 in pixels; None if there are no boxes."""
    boxes = part(output, "pred_boxes")
    if boxes is None or boxes.ndim != 3 or len(size) != 2:
        return None
    height, width = size
    center, extent = boxes.detach().float()[torch.arange(len(boxes), device="cpu"), queries].split(2, -1)
    corners = torch.cat([center - extent / 2, center + extent / 2], -1)
    return corners * corners.new_tensor([width, height, width, height])
