"""Takes a logged grid apart, where the pictures in it are all that was kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitx.errors import VitxError
from vitx.pictures.render import FAINT, GAP, LINE, PAPER, TILE_WIDTH, write

_MOST_NOTES = 4  # lines below the legend
_LIKE = 0.5  # of the difference to an empty line: fonts differ a little from version to version


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
    for notes in range(_MOST_NOTES + 1):
        found = _rows(picture[LINE : len(picture) - (2 + notes) * LINE])
        if found:
            return found
    height, width = picture.shape[:2]
    raise VitxError(f"a picture of {width} x {height} pixels is no grid of vitx")


def _rows(picture: NDArray[np.uint8]) -> list[Row]:
    """Cuts what lies between titles and legend; nothing is found where that is something else."""
    height, width = picture.shape[:2]
    columns = (width - GAP) // (TILE_WIDTH + GAP)
    lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(columns)]
    # Overlays are never white, what is between the rows is: that tells how many there are.
    fits = columns > 1 and (width - GAP) % (TILE_WIDTH + GAP) == 0
    for count in range(height // (LINE + GAP + 1) if fits else 0, 0, -1):
        if height % count:
            continue
        rows = picture.reshape(count, -1, width, 3)
        drawn = (rows[:, :, lefts[-1] : lefts[-1] + TILE_WIDTH] != 255).any(-1).all((0, 2))
        if (rows[:, -GAP:] == 255).all() and drawn[-GAP - 1]:
            top = LINE * max(1, int(drawn[::LINE].argmax()))  # captions have one or more lines
            return [
                Row(row[:top], tuple(row[top:-GAP, left : left + TILE_WIDTH] for left in lefts))
                for row in rows
            ]
    return []


def read_titles(picture: NDArray[np.uint8], known: Iterable[str]) -> list[str]:
    """Reads what stands above the columns of a grid, as no logger keeps the order of its methods.

    Args:
        picture: as `grid` drew it, (height, width, 3) uint8.
        known: the titles that there may be.

    Returns:
        The title of each column; `column 2` where it is none of those.
    """
    drawn = {title: _title(title) for title in dict.fromkeys(known)}
    found = []
    for column in range((picture.shape[1] - GAP) // (TILE_WIDTH + GAP)):
        left = GAP + column * (TILE_WIDTH + GAP)
        seen = picture[:LINE, left : left + TILE_WIDTH].astype(int)
        apart = {title: np.abs(seen - line).sum() for title, line in drawn.items()}
        best = min(apart, key=apart.__getitem__)
        read = best not in found and apart[best] <= _LIKE * np.abs(seen - 255).sum()
        found.append(best if read else f"column {column}")
    return found


def _title(text: str) -> NDArray[np.int64]:
    line = Image.new("RGB", (TILE_WIDTH, LINE), PAPER)
    write(ImageDraw.Draw(line), (0, 3), text, FAINT, TILE_WIDTH)
    return np.asarray(line).astype(int)
