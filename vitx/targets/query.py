"""One object of a detector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.targets.objects import boxes_of, probabilities, real_classes
from vitx.targets.outputs import described, main
from vitx.targets.question import Answers, Asked, Question, for_each, part_of


class Query(Question):
    """One object of a detector, as of DETR, YOLOS and RT-DETR: the logit of its class.

    Args:
        index: the number of its query, or one for each image: see `best_queries`.
        cls: the class; by default the best one of that query, other than "no object".

    Raises:
        VitxError: It is no number. Once it is put to a model: there is no such query or class, or the output
            has no queries.

    Example:
        >>> query([3, 7]).index
        tensor([3, 7])
    """

    def __init__(self, index: int | Sequence[int] | Tensor, cls: int | None = None) -> None:
        found = torch.as_tensor(index)
        if found.is_floating_point() or found.ndim > 1 or not found.numel():
            raise VitxError(f"a query is a number, or one for each image, found {index!r}")
        self.index, self.cls = found.view(-1), cls

    def of(self, images: slice) -> "Query":
        """Return the same of some of the images."""
        return Query(part_of(self.index, images), self.cls)

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Give each image its query."""
        index = for_each(self.index.to(images.device), len(images), "queries")

        def score(output: Any) -> Tensor:
            rows, asked, _ = self._found(output, model, index)
            return rows.gather(1, asked[:, None])[:, 0]

        def answers(output: Any) -> Answers:
            rows, asked, classes = self._found(output, model, index)
            sure = probabilities(rows, classes).gather(1, asked[:, None])[:, 0].tolist()
            names = declared_names(model)
            named = [names[cls] if names else f"class {cls}" for cls in asked.tolist()]
            queries = zip(index.tolist(), named, sure, strict=True)
            said = [f"query {query}: {name} {share:.0%}" for query, name, share in queries]
            return Answers(said, boxes_of(output, index, images.shape[2:]))

        return Asked(images, score, answers=answers)

    def _found(self, output: Any, model: nn.Module, index: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the logits of each image's query, (B, outputs), its class, (B,), and how many there are."""
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
