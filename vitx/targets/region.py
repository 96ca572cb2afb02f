"""A part of a dense output."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.models.outputs import what_fits
from vitx.targets.outputs import described, main, mask_queries
from vitx.targets.question import Answers, Asked, Question

_PREFIX = 8  # tokens at most that stand before the patches
_DRAWN = 30  # as many times larger than half the box that is drawn around a point is the picture

Weigh = Callable[[Tensor], Tensor]  # from an output, (B, C, h, w), to how much its cells count, (B, h, w)


def region(
    cls: int,
    *,
    box: Sequence[float] | None = None,
    mask: Any = None,
    point: Sequence[float] | None = None,
) -> "Region":
    """Asks for a class in a part of the picture: the sum of its logits there.

    A cell of the output counts by the share of it that lies in the part. Of mask queries (MaskFormer,
    Mask2Former), the logit is the sum over queries of softmax(class) * sigmoid(mask).

    Args:
        cls: the class.
        box: (x0, y0, x1, y1), in pixels of the images as the model takes them, whatever grid it puts out.
        mask: (H, W) or (B, H, W), true inside.
        point: (x, y): the cell of the output that holds this pixel.

    Returns:
        A value for `target=`.

    Raises:
        VitxError: Not exactly one of box, mask and point is given. Once it is put to a model: it lies outside
            the picture, or the output has no place for it.

    Example:
        >>> region(3, box=(0, 0, 16, 32)).box
        (0.0, 0.0, 16.0, 32.0)
    """
    return Region(cls, box, mask, point)


class Region(Question):
    """A class in a part of the picture, see `region`."""

    def __init__(self, cls: int, box: Any = None, mask: Any = None, point: Any = None) -> None:
        """Checks what was given."""
        if sum(one is not None for one in (box, mask, point)) != 1:
            raise VitxError("a region is one of box=(x0, y0, x1, y1), mask=(H, W) and point=(x, y): give one")
        self.cls, self.mask = cls, mask
        self.box = None if box is None else _numbers(box, 4, "box=(x0, y0, x1, y1)")
        self.point = None if point is None else _numbers(point, 2, "point=(x, y)")

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Finds how much each part of the picture counts."""
        if images.ndim != 4:
            raise VitxError(f"a region is a part of images (B, C, H, W), found {tuple(images.shape)}")
        height, width = images.shape[2:]
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise VitxError(f"box {self.box} is not inside images of {width} x {height} pixels")
            weigh: Weigh = partial(_of_spans, spans=((y0, y1), (x0, x1)), size=(height, width))
            boxes = torch.tensor([self.box])
        elif self.point is not None:
            x, y = self.point
            if not (0 <= x < width and 0 <= y < height):
                raise VitxError(f"point {self.point} is not inside images of {width} x {height} pixels")
            weigh = partial(_of_point, place=(y / height, x / width))
            side = max(height, width) / _DRAWN
            boxes = torch.tensor([[x - side, y - side, x + side, y + side]])
        else:
            mask = _checked(self.mask, images)
            weigh, boxes = partial(_of_mask, mask=mask), torch.stack([_around(one) for one in mask])
        score = partial(self._score, weigh=weigh, size=(height, width))
        names = declared_names(model) or ()
        name = names[self.cls] if 0 <= self.cls < len(names) else f"class {self.cls}"

        def answers(output: Any) -> Answers:
            said = [f"{name}: {value:.3g}" for value in score(output).tolist()]
            return Answers(said, boxes.expand(len(images), 4))

        return Asked(images, score, answers=answers)

    def _score(self, output: Any, *, weigh: Weigh, size: tuple[int, int]) -> Tensor:
        dense = _dense(output, size)
        if not 0 <= self.cls < dense.shape[1]:
            raise VitxError(
                f"class {self.cls} is out of range: the model has classes 0 to {dense.shape[1] - 1}"
            )
        return (dense[:, self.cls] * weigh(dense)).sum((1, 2))


def _numbers(given: Any, count: int, form: str) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in given)
    except (TypeError, ValueError):
        found = ()
    if len(found) != count:
        raise VitxError(f"a region is given as {form}, found {given!r}")
    return found


def _checked(given: Any, images: Tensor) -> Tensor:
    """Returns a mask as booleans, (B, H, W) or (1, H, W)."""
    mask = torch.as_tensor(given).to(images.device) > 0
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, len(images)) or mask.shape[1:] != images.shape[2:]:
        raise VitxError(
            f"a mask is (H, W) or (B, H, W), as the images {tuple(images.shape)}, found "
            f"{tuple(torch.as_tensor(given).shape)}"
        )
    if not mask.flatten(1).any(1).all():
        raise VitxError("the mask is empty: nothing of the picture is asked for")
    return mask


def _around(mask: Tensor) -> Tensor:
    """Returns the box around a mask, (H, W): x0, y0, x1, y1."""
    rows, columns = mask.nonzero().cpu().T
    return torch.stack([columns.amin(), rows.amin(), columns.amax() + 1, rows.amax() + 1]).float()


def _of_spans(dense: Tensor, spans: Sequence[tuple[float, float]], size: Sequence[int]) -> Tensor:
    """Returns the share of each cell that lies between some pixels."""
    rows, columns = (
        _overlap(dense, torch.tensor([span]), pixels, count)[:, 0]
        for span, pixels, count in zip(spans, size, dense.shape[2:], strict=True)
    )
    return rows[:, None] * columns


def _of_mask(dense: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of each cell that lies in a mask."""
    rows, columns = (
        _overlap(dense, torch.arange(pixels)[:, None] + torch.tensor([0, 1]), pixels, count)
        for pixels, count in zip(mask.shape[1:], dense.shape[2:], strict=True)
    )
    return rows @ mask.to(dense.dtype) @ columns.T


def _of_point(dense: Tensor, place: Sequence[float]) -> Tensor:
    """Returns 1 for the cell at some place, in units of the picture."""
    rows, columns = (
        (torch.arange(count, device=dense.device) == int(share * count)).to(dense.dtype)
        for share, count in zip(place, dense.shape[2:], strict=True)
    )
    return rows[:, None] * columns


def _overlap(dense: Tensor, spans: Tensor, pixels: int, count: int) -> Tensor:
    """Returns what share of each of some cells lies in each span, (n, 2), of a dimension: (cells, n)."""
    cell, spans = pixels / count, spans.to(dense)
    first = torch.arange(count, device=dense.device, dtype=dense.dtype)[:, None] * cell
    shared: Tensor = spans[:, 1].minimum(first + cell) - spans[:, 0].maximum(first)
    return shared.clamp(min=0) / cell


def _dense(output: Any, size: tuple[int, int]) -> Tensor:
    """Returns the logits of each class at each place, (B, C, h, w)."""
    if (queries := mask_queries(output)) is not None:
        classes, masks = queries
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
    found = main(output)
    if found is not None and found.ndim == 4:
        return found
    if found is not None and found.ndim == 3:
        return _of_tokens(found, size)
    raise VitxError(f"{described(output)}, as it has no dimensions of the picture")


def _of_tokens(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Lays the logits of tokens, (B, N, C), out in the picture; those before the patches are left out."""
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
