"""A training, played back: what each image looked like at each firing of the callback.

There are two sources: the maps that the callback saved, from which everything is drawn anew, and the grids
that it logged, which are taken apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vitx import render
from vitx.captions import Caption, captions_of
from vitx.errors import VitxError
from vitx.methods import title_of
from vitx.runs.cutting import cut
from vitx.runs.saved import SavedMaps

Picture = NDArray[np.uint8]  # (height, width, 3)


class Playback(Protocol):
    """What both sources can tell."""

    @property
    def steps(self) -> Sequence[int]:
        """Those of the firings, in order."""

    @property
    def count(self) -> int:
        """How many images there are."""

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Returns title -> picture of an image at a firing (its place in `steps`), the input first."""

    def caption(self, firing: int, image: int) -> Caption | Picture:
        """Returns what the model says, in words, or, where only the grid was kept, as a picture."""

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """Draws the grid of some images at one firing; logged grids keep the width that they have."""


@dataclass(frozen=True)
class FromMaps:
    """Draws from saved maps."""

    saved: SavedMaps

    @property
    def steps(self) -> Sequence[int]:
        """Those of the firings, in order."""
        return self.saved.steps

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.saved.pixels)

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Draws one image, title -> picture."""
        return {title: pictures[0].numpy() for title, pictures in self._columns(firing, [image]).items()}

    def caption(self, firing: int, image: int) -> Caption:
        """Says what the model saw in one image."""
        return self.captions(firing)[image]

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """Draws the grid as the callback does."""
        captions = self.captions(firing)
        return render.grid(
            self._columns(firing, images),
            [captions[image] for image in images],
            colormap=self.saved.colormap,
            tile_width=tile_width,
            note=self.saved.note,
        )

    def captions(self, firing: int) -> list[Caption]:
        """Says what the model saw in all images."""
        labels = None if self.saved.labels is None else torch.from_numpy(self.saved.labels)
        return captions_of(torch.from_numpy(self.saved.logits[firing]), labels, self.saved.class_names)

    def _columns(self, firing: int, images: Sequence[int]) -> dict[str, torch.Tensor]:
        pixels = torch.from_numpy(self.saved.pixels[list(images)])
        columns = {"input": pixels}
        for name, maps in self.saved.maps.items():
            chosen = torch.from_numpy(maps[firing, list(images)])
            columns[title_of(name)] = render.overlaid(pixels, chosen, self.saved.colormap)
        return columns


class FromGrids:
    """Takes logged grids apart.

    Args:
        grids: step -> the grid that was logged there.
        methods: their names, in the order of the columns.

    Raises:
        VitxError: One of the pictures is no grid.
    """

    def __init__(self, grids: Mapping[int, Picture], methods: Sequence[str]) -> None:
        self.steps: Sequence[int] = tuple(sorted(grids))
        self._grids = [grids[step] for step in self.steps]
        self._rows = [cut(grid) for grid in self._grids]
        if len({rows[0].tiles[0].shape for rows in self._rows}) > 1:
            raise VitxError("the logged pictures changed their size: keep those of one training alone")
        self.count = min(map(len, self._rows))
        columns = min(len(rows[0].tiles) for rows in self._rows)
        names = [*methods, *(f"method {number}" for number in range(len(methods) + 1, columns))]
        self._titles = ["input", *(title_of(name) for name in names)][:columns]

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Cuts one image out, title -> picture."""
        return dict(zip(self._titles, self._rows[firing][image].tiles, strict=False))

    def caption(self, firing: int, image: int) -> Picture:
        """Cuts the line of text out."""
        return self._rows[firing][image].caption

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """Joins the rows of some images anew, between the titles and the legend."""
        grid = self._grids[firing]
        height = (len(grid) - 3 * render.LINE) // len(self._rows[firing])
        tops = [render.LINE + image * height for image in images]
        rows = [grid[top : top + height] for top in tops]
        return np.concatenate([grid[: render.LINE], *rows, grid[-2 * render.LINE :]])
