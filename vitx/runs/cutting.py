"""Takes a logged grid apart, where the pictures in it are all that was kept."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitx.errors import VitxError
from vitx.render import GAP, LINE, TILE_WIDTH


@dataclass(frozen=True)
class Row:
    """What a grid shows of one image.

    Attributes:
        caption: the picture of its words, (line, width, 3) uint8.
        tiles: the pictures beside each other, (h, w, 3) uint8 each.
    """

    caption: NDArray[np.uint8]
    tiles: tuple[NDArray[np.uint8], ...]


def cut(picture: NDArray[np.uint8]) -> list[Row]:
    """Cuts a grid into what it was made of.

    Args:
        picture: as `grid` drew it, (height, width, 3) uint8.

    Raises:
        VitxError: The picture is no such grid.
    """
    height, width = picture.shape[0] - 3 * LINE, picture.shape[1]
    columns = (width - GAP) // (TILE_WIDTH + GAP)
    lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(columns)]
    # Overlays are never white, what is between the rows is: that tells how many there are.
    fits = columns > 1 and (width - GAP) % (TILE_WIDTH + GAP) == 0
    for count in range(height // (LINE + GAP + 1) if fits else 0, 0, -1):
        if height % count:
            continue
        rows = picture[LINE : LINE + height].reshape(count, -1, width, 3)
        drawn = (rows[:, :, lefts[-1] : lefts[-1] + TILE_WIDTH] != 255).any(-1).all((0, 2))
        if (rows[:, -GAP:] == 255).all() and drawn[-GAP - 1]:
            top = LINE * max(1, int(drawn[::LINE].argmax()))  # captions have one or more lines
            return [
                Row(row[:top], tuple(row[top:-GAP, left : left + TILE_WIDTH] for left in lefts))
                for row in rows
            ]
    raise VitxError(f"a picture of {width} x {picture.shape[0]} pixels is no grid of vitx")
