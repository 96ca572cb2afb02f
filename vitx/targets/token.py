"""One patch: where it looks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.targets.question import Answers, Asked, Question


def token(
    y: int | Sequence[int] | Tensor | None = None,
    x: int | Sequence[int] | Tensor | None = None,
    *,
    pixel: Sequence[float] | None = None,
) -> "Token":
    """Asks where a patch looks: all begins at its token, as the last layer put it out.

    It is the token of the last attention between tokens of the picture. The rollout is its row of the product
    of all layers, "attention" its row of the last one, "flow" what flows to it. Methods of a score take the
    squared length of its features, behind the norm that follows the last layer, if there is one: what made
    this token what it is.

    Args:
        y: the row in the grid of the map, from 0 at the top; or one for each image.
        x: the column, from 0 on the left.
        pixel: (x, y), in place of these: the patch that holds this pixel of the images as the model takes
            them.

    Returns:
        A value for `target=`.

    Raises:
        VitxError: Neither a patch nor a pixel is given, or both. Once it is put to a model: it lies outside
            the map, or no tokens of a layer lie in the picture.

    Example:
        >>> token(3, 5).places
        [(3.0, 5.0)]
    """
    return Token(y, x, pixel)


class Token(Question):
    """One patch, see `token`."""

    def __init__(self, y: Any = None, x: Any = None, pixel: Any = None) -> None:
        """Checks what was given."""
        if (y is None) != (x is None) or (y is None) == (pixel is None):
            raise VitxError("a patch is token(y, x), its row and column, or pixel=(x, y): give one of these")
        self.pixel = pixel is not None
        rows, columns = (_listed(one) for one in ((y, x) if pixel is None else _turned(pixel)))
        if len(rows) != len(columns) or not rows:
            raise VitxError(
                f"a patch is a row and a column, found {len(rows)} rows and {len(columns)} columns"
            )
        self.places = list(zip(rows, columns, strict=True))

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Gives each image its patch."""
        if images.ndim != 4:
            raise VitxError(f"a patch is one of images (B, C, H, W), found {tuple(images.shape)}")
        if len(self.places) not in (1, len(images)):
            raise VitxError(f"{len(self.places)} patches for {len(images)} images: give one for each image")
        places = self.places * (len(images) // len(self.places))
        size = tuple(images.shape[2:])
        said = "pixel" if self.pixel else "patch"
        captions = [f"{said} ({', '.join(f'{n:g}' for n in (p[::-1] if self.pixel else p))})" for p in places]
        return Asked(
            images,
            cells=partial(self._cells, places, size),
            answers=lambda _: Answers(captions),
        )

    def _cells(
        self, places: Sequence[tuple[float, float]], size: Sequence[int], grid: tuple[int, ...]
    ) -> list[tuple[int, ...]]:
        """Returns the cell of each image in a grid."""
        whole = size if self.pixel else grid
        for place in places:
            if any(not 0 <= at < count for at, count in zip(place, whole, strict=True)):
                said = f"{whole[0]} x {whole[1]} {'pixels' if self.pixel else 'patches'} of the map"
                raise VitxError(f"({place[0]:g}, {place[1]:g}) (row, column) lies outside the {said}")
        return [
            tuple(int(at * count / n) for at, count, n in zip(place, grid, whole, strict=True))
            for place in places
        ]


def _listed(given: Any) -> list[float]:
    return [*map(float, torch.as_tensor(given).view(-1))]


def _turned(pixel: Any) -> tuple[Tensor, Tensor]:
    """Returns y and x of (x, y)."""
    found = torch.as_tensor(pixel)
    if found.shape != (2,):
        raise VitxError(f"a pixel is (x, y), found {pixel!r}")
    return found[1], found[0]
