"""Marks on pictures of maps: boxes, rings around sinks, and words where a map alone would mislead."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitx.evaluation.metrics import entropy
from vitx.pictures.render import INK, PAPER, TILE_WIDTH, font, scaled_up

UNIFORM = 0.99  # of the entropy
BOX = "#00b3a4"  # the outline of the box of a target
SINKS = "rings: patches that most others attend to whatever they look for, no evidence (sinks)"
_READABLE = 224  # pixels: in narrower pictures, lines are coarse and words small
_LETTERS, _SMALLEST = 13 / TILE_WIDTH, 4  # height of letters: share of the picture, and pixels at least


def say_uniform(drawn: Tensor, maps: Tensor, signed: Tensor | None = None) -> Tensor:
    """Stamp pictures, (B, H, W, 3) uint8, whose maps are nearly uniform, as scaling makes blotches of them.

    Also those in which all patches speak against the score: such a map is bright where they do so the least.
    """
    said = ["nearly uniform" if one else "" for one in (entropy(maps) > UNIFORM).tolist()]
    if signed is not None:
        against = all_against(signed).tolist()
        said = ["all against" if one else word for one, word in zip(against, said, strict=True)]
    return _stamped(drawn, said) if any(said) else drawn


def all_against(signed: Tensor) -> Tensor:
    """Return in which maps, (B, ...), some patches speak against the score, and none for it, (B,)."""
    values = signed.flatten(1)
    return (values.amax(1) <= 0) & (values.amin(1) < 0)


def outlined(pictures: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Draw a box into each picture, (B, H, W, 3) uint8, scaled up where lines would be coarse.

    Args:
        pictures: (B, H, W, 3) uint8.
        boxes: (B, 4): x0, y0, x1, y1 in an image of the given size.
        size: height and width of the image.
    """

    def paint(place: int, canvas: Image.Image, draw: ImageDraw.ImageDraw) -> None:
        scale = (canvas.width / size[1], canvas.height / size[0]) * 2
        edges = [canvas.width - 1, canvas.height - 1] * 2
        box = boxes[place].tolist()
        corners = [min(max(0, at * by), edge) for at, by, edge in zip(box, scale, edges, strict=True)]
        line = max(2, canvas.width // 112)
        draw.rectangle(corners, outline=PAPER, width=line + 2)
        inside = [corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1]
        if inside[0] < inside[2] and inside[1] < inside[3]:
            draw.rectangle(inside, outline=BOX, width=line)

    return _painted(pictures, paint)


def ringed(pictures: Tensor, marks: Tensor) -> Tensor:
    """Draw a thin ring around each marked patch, scaled up where lines would be coarse.

    Args:
        pictures: (B, H, W, 3) uint8.
        marks: (B, h, w) bool.
    """

    def paint(place: int, canvas: Image.Image, draw: ImageDraw.ImageDraw) -> None:
        high, wide = canvas.height / marks.shape[1], canvas.width / marks.shape[2]
        for row, column in marks[place].nonzero().tolist():
            box = (column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1)
            draw.ellipse(box, outline=PAPER, width=3)
            draw.ellipse([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=BOX, width=1)

    return _painted(pictures, paint)


def _stamped(pictures: Tensor, texts: Sequence[str]) -> Tensor:
    """Write a few words into the lower edge of each picture; nothing where they are empty."""

    def paint(place: int, canvas: Image.Image, draw: ImageDraw.ImageDraw) -> None:
        text, height = texts[place], max(8, round(min(canvas.size) * _LETTERS))
        if not text:
            return
        while height > _SMALLEST and font(height).getlength(text) > canvas.width:
            height -= 1
        draw.rectangle((0, canvas.height - 1.4 * height, canvas.width, canvas.height), INK)
        below = (canvas.width / 2, canvas.height - 0.2 * height)
        draw.text(below, text, PAPER, font(height), anchor="md")

    return _painted(pictures, paint)


def _painted(pictures: Tensor, paint: Callable[[int, Image.Image, ImageDraw.ImageDraw], None]) -> Tensor:
    """Paint on each picture, (B, H, W, 3) uint8, scaled up by a whole number where it is small."""
    canvases = [Image.fromarray(one) for one in scaled_up(pictures.cpu(), _READABLE).numpy()]
    for place, canvas in enumerate(canvases):
        paint(place, canvas, ImageDraw.Draw(canvas))
    return torch.from_numpy(np.stack([np.array(canvas) for canvas in canvases]))
