"""Targets for a place in the picture: a region of a dense output, or one patch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.classes import declared_names
from vitx.models.outputs import described, main, mask_queries, part
from vitx.models.prediction import check_range, numbers
from vitx.targets.question import Answers, Asked, Question, for_each

_PREFIX = 8  # maximum number of tokens before the patches
_DRAWN = 30  # the longer side of the picture, divided by half the side of the box drawn around a point

Number = int | Sequence[int] | Tensor
Spans = Sequence[tuple[float, float]]  # begin and end along rows or columns, in pixels


class Region(Question):
    """A class in a region of the picture: the sum of its logits there.

    Each cell of the output is weighted by the share of its area inside the region. For mask queries
    (MaskFormer, Mask2Former), the logit is the sum over queries of softmax(class) * sigmoid(mask).

    Args:
        cls: the class.
        box: (x0, y0, x1, y1), in pixels of the model's input, whatever the grid of the output.
        mask: (H, W) or (B, H, W), true inside.
        point: (x, y): the cell of the output that contains this pixel.
    """

    rows = "mask"

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
        inside = None if mask is None else numbers(mask, "a mask is made of numbers, (H, W) or (B, H, W)") > 0
        self.mask = inside[None] if inside is not None and inside.ndim == 2 else inside

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Ask for the sum of the logits of the class, weighted by the region."""
        if images.ndim != 4:
            raise VitxError(f"a region is a part of images (B, C, H, W), found {tuple(images.shape)}")
        height, width = images.shape[2:]
        rows, columns, mask, boxes = self._part(images)
        names = declared_names(model) or ()
        name = names[self.cls] if 0 <= self.cls < len(names) else f"class {self.cls}"

        def answers(output: Any) -> Answers:
            dense, grid = _dense(output, (height, width))
            check_range("class", torch.tensor(self.cls, device="cpu"), "classes", dense.shape[1])
            down, across = _shared(dense, 2, rows, height), _shared(dense, 3, columns, width)
            scores = (dense[:, self.cls] * (down @ mask.to(dense) @ across.T)).sum((1, 2))
            said = [f"{name}: {value:.3g}" for value in scores.tolist()]
            return Answers(scores, said, boxes.expand(len(images), 4), grid=grid)

        return Asked(images, answers)

    def _part(self, images: Tensor) -> tuple[Spans, Spans, Tensor, Tensor]:
        """Return spans of rows and columns, a mask of their intersections, and the boxes to draw."""
        height, width = images.shape[2:]
        if self.box is None and self.point is None:
            mask = self._checked(images)
            rows, columns = ([(at, at + 1.0) for at in range(count)] for count in (height, width))
            places = [one.nonzero().cpu() for one in mask]  # row and column of each pixel inside
            boxes = [torch.cat([one.amin(0).flip(0), one.amax(0).flip(0) + 1]) for one in places]
            return rows, columns, mask, torch.stack(boxes).float()
        named, part = ("box", self.box) if self.box else ("point", self.point or ())
        (x0, y0), (x1, y1) = part[:2], part[-2:]
        inside = x0 < x1 and y0 < y1 if self.box else x1 < width and y1 < height
        if not (inside and x0 >= 0 and x1 <= width and y0 >= 0 and y1 <= height):
            raise VitxError(f"{named} {part} is not inside images of {width} x {height} pixels")
        side = 0 if self.box else max(height, width) / _DRAWN
        box = torch.tensor([[x0 - side, y0 - side, x1 + side, y1 + side]], device="cpu")
        return [(y0, y1)], [(x0, x1)], torch.ones(1, 1, 1, dtype=torch.bool, device="cpu"), box

    def _checked(self, images: Tensor) -> Tensor:
        """Return the mask of each image, (B, H, W); raise a VitxError if it is empty or does not fit."""
        mask, size = torch.as_tensor(self.mask, device="cpu"), tuple(images.shape)
        if mask.ndim != 3 or mask.shape[1:] != images.shape[2:]:
            found = tuple(mask.shape[1:] if len(mask) == 1 else mask.shape)
            raise VitxError(f"a mask must be (H, W) or (B, H, W) to fit images {size}, found {found}")
        if not mask.flatten(1).any(1).all():
            raise VitxError("the mask is empty: mark at least one pixel in each image")
        return for_each(mask.to(images.device), len(images), "masks")


region = Region


def _numbers(given: Any, count: int, form: str) -> tuple[float, ...]:
    form = f"give numbers as {form}"
    found = numbers(given, form, torch.float64)
    if found.shape != (count,):
        raise VitxError(f"{form}, found {given!r}")
    return tuple(found.tolist())


def _shared(dense: Tensor, dim: int, spans: Spans, pixels: int) -> Tensor:
    """Return the share of each cell along `dim` inside each span, (cells, spans); 1 for a point's cell."""
    begin, end = dense.new_tensor(spans, dtype=torch.float32).T
    cell = pixels / dense.shape[dim]
    edges = torch.arange(dense.shape[dim] + 1, device=dense.device)[:, None] * cell
    first, last = edges[:-1], edges[1:]
    shared = (end.minimum(last) - begin.maximum(first)).clamp(min=0) / cell
    return torch.where(begin < end, shared, (first <= begin) & (begin < last)).to(dense)


def _dense(output: Any, size: tuple[int, int]) -> tuple[Tensor, tuple[int, ...] | None]:
    """Return the logits of each class at each place, (B, C, h, w), and (h, w) if tokens were arranged so."""
    if (queries := mask_queries(output)) is not None:
        classes, masks = queries
        return torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], masks.sigmoid()), None
    found = main(output)
    if found is not None and found.ndim == 4:
        return found, None
    if found is not None and found.ndim == 3 and part(output, "pred_boxes") is None:
        dense = _of_tokens(found, size)
        return dense, tuple(dense.shape[2:])
    raise VitxError(f"{described(output)}, since it has no spatial dimensions")


def _of_tokens(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Arrange the logits of tokens, (B, N, C), as (B, C, h, w), without tokens before the patches."""
    height, width = size
    for before in range(min(_PREFIX, tokens.shape[1] - 1) + 1):
        count = int(tokens.shape[1]) - before
        rows = round((count * height / width) ** 0.5)
        if rows and rows * (count // rows) == count and rows * width == count // rows * height:
            patches: Tensor = tokens[:, before:].unflatten(1, (rows, -1))
            return patches.permute(0, 3, 1, 2)
    found = f"the output is {tuple(tokens.shape)}, (B, tokens, classes)"
    raise VitxError(f"{found}, but {tokens.shape[1]} tokens form no grid over {height} x {width} pixels")


class Token(Question):
    """One patch: relevance starts at its token in the output of the last layer.

    The rollout is the token's row in the product of all layers, "attention" its row in the last layer, and
    "flow" the flow that reaches it. Methods that explain a score take the squared length of the token's
    features, after the norm that follows the last layer, if any: what made this token what it is.

    Args:
        y: the row in the grid of the map, starting at 0 at the top; or one per image.
        x: the column, starting at 0 on the left; or one per image.
        pixel: (x, y), instead of y and x: a pixel of the patch, in the model's input.
    """

    rows = "places"

    def __init__(self, y: Number | None = None, x: Number | None = None, *, pixel: Any = None) -> None:
        if (y is None) != (x is None) or (y is None) == (pixel is None):
            raise VitxError("a patch is token(y, x), its row and column, or pixel=(x, y): give one of these")
        self.pixel = pixel is not None
        given: Any = _numbers(pixel, 2, "pixel=(x, y)")[::-1] if self.pixel else (y, x)
        form = "a row or column of a patch is a number, or one for each image"
        rows, columns = (numbers(one, form).view(-1) for one in given)
        if len(rows) != len(columns) or not len(rows):
            raise VitxError(f"give rows and as many columns, found {len(rows)} and {len(columns)}")
        self.places = torch.stack([rows, columns], 1).float()

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Ask for the token of each image's patch."""
        if images.ndim != 4:
            raise VitxError(f"a patch is a part of images (B, C, H, W), found {tuple(images.shape)}")
        places = for_each(self.places, len(images), "patches").tolist()
        size = tuple(images.shape[2:])

        def cells(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
            height, width = size if self.pixel else grid
            for y, x in places:
                if not (0 <= y < height and 0 <= x < width):
                    place = f"pixel x={x:g}, y={y:g}" if self.pixel else f"patch in row {y:g}, column {x:g}"
                    known = f"rows 0 to {height - 1} and columns 0 to {width - 1}"
                    raise VitxError(f"there is no {place}: there are {known}")
            return [(int(y * grid[0] / height), int(x * grid[1] / width)) for y, x in places]

        said = [f"pixel ({x:g}, {y:g})" if self.pixel else f"patch ({y:g}, {x:g})" for y, x in places]
        return Asked(images, lambda _: Answers(captions=said), cells=cells)


token = Token
