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
    # Overlays are never white, what is between the rows is: that tells how many there are.
    fits = columns > 1 and (width - GAP) % (TILE_WIDTH + GAP) == 0
    for count in range(height // (LINE + GAP + 1) if fits else 0, 0, -1):
        rows = picture[LINE : LINE + height].reshape(count, -1, width, 3) if height % count == 0 else None
        if rows is not None and (rows[:, -GAP:] == 255).all():
            lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(columns)]
            return [
                Row(row[:LINE], tuple(row[LINE:-GAP, left : left + TILE_WIDTH] for left in lefts))
                for row in rows
            ]
    raise VitxError(f"a picture of {width} x {picture.shape[0]} pixels is no grid of vitx")
