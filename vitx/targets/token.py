"""One patch: where it looks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.targets.question import Answers, Asked, Question, for_each, part_of

Number = int | Sequence[int] | Tensor


class Token(Question):
    """The view of one patch: relevance begins at its token in the output of the last layer.

    It is the token of the last attention between tokens of the picture. The rollout is its row of the product
    of all layers, "attention" its row of the last one, "flow" what flows to it. Methods of a score take the
    squared length of its features, behind the norm that follows the last layer, if there is one: what made
    this token what it is.

    Args:
        y: the row in the grid of the map, from 0 at the top; or one for each image.
        x: the column, from 0 on the left.
        pixel: (x, y), in place of these: the patch that holds this pixel of the images as the model takes
            them.

    Raises:
        VitxError: Neither a patch nor a pixel is given, or both. Once it is put to a model: it lies outside
            the map, or no tokens of a layer lie in the picture.

    Example:
        >>> token(3, 5).places
        tensor([[3., 5.]])
    """

    def __init__(self, y: Number | None = None, x: Number | None = None, *, pixel: Any = None) -> None:
        if (y is None) != (x is None) or (y is None) == (pixel is None):
            raise VitxError("a patch is token(y, x), its row and column, or pixel=(x, y): give one of these")
        self.pixel = pixel is not None
        if self.pixel and torch.as_tensor(pixel).shape != (2,):
            raise VitxError(f"a pixel is (x, y), found {pixel!r}")
        rows, columns = (torch.as_tensor(one).view(-1) for one in (pixel[::-1] if self.pixel else (y, x)))
        if len(rows) != len(columns) or not len(rows):
            raise VitxError(
                f"a patch is a row and a column, found {len(rows)} rows and {len(columns)} columns"
            )
        self.places = torch.stack([rows, columns], 1).float()

    def of(self, images: slice) -> "Token":
        """Return the same of some of the images."""
        rows, columns = part_of(self.places, images).T
        return self if self.pixel else Token(rows, columns)

    def put(self, model: nn.Module, images: Tensor) -> Asked:
        """Give each image its patch."""
        if images.ndim != 4:
            raise VitxError(f"a patch is one of images (B, C, H, W), found {tuple(images.shape)}")
        places = for_each(self.places, len(images), "patches").tolist()
        size = tuple(images.shape[2:])

        def cells(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
            whole = size if self.pixel else grid
            for y, x in places:
                if not (0 <= y < whole[0] and 0 <= x < whole[1]):
                    said = f"{whole[0]} x {whole[1]} {'pixels' if self.pixel else 'patches'} of the map"
                    raise VitxError(f"({y:g}, {x:g}) (row, column) lies outside the {said}")
            return [
                tuple(int(at * count / n) for at, count, n in zip(place, grid, whole, strict=True))
                for place in places
            ]

        said = [f"pixel ({x:g}, {y:g})" if self.pixel else f"patch ({y:g}, {x:g})" for y, x in places]
        return Asked(images, cells=cells, answers=lambda _: Answers(said))


token = Token
