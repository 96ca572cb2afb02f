"""A part of a dense output."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.models.outputs import what_fits
from vitx.targets.outputs import described, main, mask_queries, part
from vitx.targets.question import Answers, Asked, Question, for_each, part_of

_PREFIX = 8  # tokens at most that stand before the patches
_DRAWN = 30  # as many times larger than half the box that is drawn around a point is the picture

Spans = Sequence[tuple[float, float]]
Weigh = Callable[[Tensor], Tensor]  # from an output, (B, C, h, w), to how much its cells count, (B, h, w)


class Region(Question):
    """A class in a part of the picture: the sum of its logits there.

    A cell of the output counts by the share of it that lies in the part. Of mask queries (MaskFormer,
    Mask2Former), the logit is the sum over queries of softmax(class) * sigmoid(mask).

    Args:
        cls: the class.
        box: (x0, y0, x1, y1), in pixels of the images as the model takes them, whatever grid it puts out.
        mask: (H, W) or (B, H, W), true inside.
        point: (x, y): the cell of the output that holds this pixel.

    Raises:
        VitxError: Not exactly one of box, mask and point is given. Once it is put to a model: it lies outside
            the picture, or the output has no place for it.

    Example:
        >>> region(3, box=(0, 0, 16, 32)).box
        (0.0, 0.0, 16.0, 32.0)
    """

    def __init__(
        self,
        cls: int,
        *,
        box: Sequence[float] | None = None,
        mask: Any = None,
        point: Sequence[float] | None = None,
    ) -> None:
        if sum(one is not None for one in (box, mask, point)) != 1:
            raise VitxError("a region is one of box=(x0, y0, x1, y1), mask=(H, W) and point=(x, y): give one")
        self.cls = cls
        self.box = None if box is None else _numbers(box, 4, "box=(x0, y0, x1, y1)")
        self.point = None if point is None else _numbers(point, 2, "point=(x, y)")
        self.mask = None if mask is None else torch.as_tensor(mask) > 0
        if self.mask is not None and self.mask.ndim == 2:
            self.mask = self.mask[None]

    def of(self, images: slice) -> "Region":
        """Return the same of some of the images."""
        return self if self.mask is None else Region(self.cls, mask=part_of(self.mask, images))

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Find how much each part of the picture counts."""
        if images.ndim != 4:
            raise VitxError(f"a region is a part of images (B, C, H, W), found {tuple(images.shape)}")
        height, width = images.shape[2:]
        weigh, boxes = self._weigh(images)
        names = declared_names(model) or ()
        name = names[self.cls] if 0 <= self.cls < len(names) else f"class {self.cls}"

        def score(output: Any) -> Tensor:
            dense = _dense(output, (height, width))
            if not 0 <= self.cls < dense.shape[1]:
                known = f"the model has classes 0 to {dense.shape[1] - 1}"
                raise VitxError(f"class {self.cls} is out of range: {known}")
            return (dense[:, self.cls] * weigh(dense)).sum((1, 2))

        def answers(output: Any) -> Answers:
            said = [f"{name}: {value:.3g}" for value in score(output).tolist()]
            return Answers(said, boxes.expand(len(images), 4))

        return Asked(images, score, answers=answers)

    def _weigh(self, images: Tensor) -> tuple[Weigh, Tensor]:
        """Return how much cells count, and the box to draw of each part."""
        height, width = images.shape[2:]
        inside = f"is not inside images of {width} x {height} pixels"
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise VitxError(f"box {self.box} {inside}")
            spans, whole = ([(y0, y1)], [(x0, x1)]), torch.ones(1, 1, 1, dtype=torch.bool)
            return lambda dense: _covered(dense, spans, whole, (height, width)), torch.tensor([self.box])
        if self.point is not None:
            x, y = self.point
            if not (0 <= x < width and 0 <= y < height):
                raise VitxError(f"point {self.point} {inside}")
            side = max(height, width) / _DRAWN
            box = torch.tensor([[x - side, y - side, x + side, y + side]])
            return lambda dense: _cell(dense, y / height, x / width), box
        mask = self._checked(images)
        pixels = [[(at, at + 1.0) for at in range(count)] for count in (height, width)]
        boxes = torch.stack([_around(one) for one in mask])
        return lambda dense: _covered(dense, pixels, mask, (height, width)), boxes

    def _checked(self, images: Tensor) -> Tensor:
        """Return the mask of each image, (B, H, W)."""
        mask, size = torch.as_tensor(self.mask), tuple(images.shape)
        if mask.ndim != 3 or mask.shape[1:] != images.shape[2:]:
            found = tuple(mask.shape[1:] if len(mask) == 1 else mask.shape)
            raise VitxError(f"a mask is (H, W) or (B, H, W), as the images {size}, found {found}")
        if not mask.flatten(1).any(1).all():
            raise VitxError("the mask is empty: nothing of the picture is asked for")
        return for_each(mask.to(images.device), len(images), "masks")


region = Region


def _numbers(given: Any, count: int, form: str) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in given)
    except (TypeError, ValueError):
        found = ()
    if len(found) != count:
        raise VitxError(f"a region is given as {form}, found {given!r}")
    return found


def _around(mask: Tensor) -> Tensor:
    """Return the box around a mask, (H, W): x0, y0, x1, y1."""
    rows, columns = mask.nonzero().cpu().T
    return torch.stack([columns.amin(), rows.amin(), columns.amax() + 1, rows.amax() + 1]).float()


def _covered(dense: Tensor, spans: Sequence[Spans], mask: Tensor, size: Sequence[int]) -> Tensor:
    """Return the share of each cell that a mask, (B, n, m), covers whose rows and columns are spans.

    It is computed in the pass: what was there before counts as weights of the model.
    """
    rows, columns = (
        _shared(dense, along, pixels / count, count)
        for along, pixels, count in zip(spans, size, dense.shape[2:], strict=True)
    )
    return rows @ mask.to(dense) @ columns.T


def _shared(dense: Tensor, spans: Spans, cell: float, count: int) -> Tensor:
    """Return the share of each of some cells that lies in each span of pixels: (cells, spans)."""
    begin, end = dense.new_tensor(spans).T
    first = torch.arange(count, device=dense.device, dtype=dense.dtype)[:, None] * cell
    shared: Tensor = end.minimum(first + cell) - begin.maximum(first)
    return shared.clamp(min=0) / cell


def _cell(dense: Tensor, y: float, x: float) -> Tensor:
    """Return 1 for the cell at some place, in units of the picture."""
    found = dense.new_zeros(dense.shape[2:])
    found[int(y * dense.shape[2]), int(x * dense.shape[3])] = 1
    return found


def _dense(output: Any, size: tuple[int, int]) -> Tensor:
    """Return the logits of each class at each place, (B, C, h, w)."""
    if (queries := mask_queries(output)) is not None:
        classes, masks = queries
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    found = main(output)
    if found is not None and found.ndim == 4:
        return found
    if found is not None and found.ndim == 3 and part(output, "pred_boxes") is None:
        return _of_tokens(found, size)
    raise VitxError(f"{described(output)}, as it has no dimensions of the picture")


def _of_tokens(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay the logits of tokens, (B, N, C), out in the picture; those before the patches are left out."""
    height, width = size
    for before in range(min(_PREFIX, tokens.shape[1] - 1) + 1):
        count = int(tokens.shape[1]) - before
        rows = round((count * height / width) ** 0.5)
        if rows and rows * (count // rows) == count and rows * width == count // rows * height:
            patches: Tensor = tokens[:, before:].unflatten(1, (rows, -1))
            return patches.permute(0, 3, 1, 2)
    raise VitxError(
        f"the output is {tuple(tokens.shape)}, and {tokens.shape[1]} tokens do not lie as a picture of "
        f"{height} x {width} pixels does: {what_fits(tokens.shape)}"
    )
