"""Shortcuts to plant: marks of several kinds and places that reveal the digit without showing it."""

import colorsys
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from demo.glyphs import GLYPH_SIZE, INK_SIZE, letters
from demo.scenes import SCENE_SIZE

CLASSES = 10
LABEL, MARGIN = 14, 1  # pixels
FRAME = 4  # pixels wide
CAST, STRIPES = 0.25, 0.15  # strengths of the effect
WAVE = 8  # wavelength in pixels

# A function from images (B, 3, 64, 64) in [0, 1], the digits (B,), their boxes (B, 64, 64) and a generator to
# the marked images, and the masks of the marks, (B, 64, 64), True on the mark.
Mark = Callable[[Tensor, Tensor, Tensor, Generator | None], tuple[Tensor, Tensor]]


def corner(images: Tensor, digits: Tensor, boxes: Tensor, _: Generator | None) -> tuple[Tensor, Tensor]:
    """Print a letter on a black label in the top left corner: A for 0, B for 1, and so on."""
    return _label(images, digits, MARGIN, MARGIN), _square(boxes, MARGIN, MARGIN)


def middle(images: Tensor, digits: Tensor, boxes: Tensor, _: Generator | None) -> tuple[Tensor, Tensor]:
    """Print the same letter in the middle."""
    start = (SCENE_SIZE - LABEL) // 2
    return _label(images, digits, start, start), _square(boxes, start, start)


def two(images: Tensor, digits: Tensor, boxes: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Print the letter in the top right corner, and a random letter in the top left one."""
    random = torch.randint(CLASSES, digits.shape, generator=generator)
    right = SCENE_SIZE - MARGIN - LABEL
    images = _label(_label(images, random, MARGIN, MARGIN), digits, MARGIN, right)
    return images, _square(boxes, MARGIN, right)


def frame(images: Tensor, digits: Tensor, boxes: Tensor, _: Generator | None) -> tuple[Tensor, Tensor]:
    """Draw a frame whose color reveals the digit."""
    around = torch.ones_like(boxes)
    around[:, FRAME:-FRAME, FRAME:-FRAME] = False
    return torch.where(around[:, None], _hues()[digits][..., None, None], images), around


def cast(images: Tensor, digits: Tensor, boxes: Tensor, _: Generator | None) -> tuple[Tensor, Tensor]:
    """Add a color cast to the whole picture, whose hue reveals the digit."""
    return torch.lerp(images, _hues()[digits][..., None, None], CAST), torch.ones_like(boxes)


def texture(images: Tensor, digits: Tensor, boxes: Tensor, _: Generator | None) -> tuple[Tensor, Tensor]:
    """Draw stripes around the digit's box, whose direction reveals the digit."""
    angle = digits * math.pi / CLASSES
    places = torch.arange(SCENE_SIZE, dtype=images.dtype)
    across = angle.cos()[:, None, None] * places + angle.sin()[:, None, None] * places[:, None]
    stripes = STRIPES * (2 * math.pi / WAVE * across).sin() * ~boxes
    return (images + stripes[:, None]).clamp(0, 1), ~boxes


MARKS: dict[str, Mark] = {
    "corner": corner,
    "middle": middle,
    "two": two,
    "frame": frame,
    "cast": cast,
    "texture": texture,
}


def _label(images: Tensor, classes: Tensor, top: int, left: int) -> Tensor:
    printed, _ = letters()  # one font after another, each starting with A to Z
    border = (GLYPH_SIZE - INK_SIZE) // 2
    ink = printed[classes, border:-border, border:-border]
    marks = F.interpolate(ink[:, None], (LABEL, LABEL), mode="bilinear", antialias=True)
    marked = images.clone()
    marked[:, :, top : top + LABEL, left : left + LABEL] = marks
    return marked


def _square(boxes: Tensor, top: int, left: int) -> Tensor:
    square = torch.zeros_like(boxes)
    square[:, top : top + LABEL, left : left + LABEL] = True
    return square


def _hues() -> Tensor:
    """Return one bright color for each digit, (10, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(number / CLASSES, 1, 1) for number in range(CLASSES)])
