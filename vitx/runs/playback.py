"""A training, played back: what each image looked like at each firing of the callback.

There are two sources: the maps that the callback saved, from which everything is drawn anew, and the grids
that it logged, which are taken apart.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vitx.errors import VitxError
from vitx.methods import title_of
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.runs.cutting import Row, cut, read_titles
from vitx.runs.logged import decode
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

    @property
    def titles(self) -> Sequence[str]:
        """Those of the methods."""

    def input(self, image: int) -> Picture:
        """Returns an image as it is."""

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Returns title -> picture of an image at a firing (its place in `steps`), the input first."""

    def caption(self, firing: int, image: int) -> Caption | Picture:
        """Returns what the model says, in words, or, where only the grid was kept, as a picture."""

    def captions(self, firing: int) -> Sequence[Caption | Picture]:
        """Returns those of all images."""

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

    @property
    def maps(self) -> dict[str, NDArray[np.float32]]:
        """Those of each method by its title, (firings, images, h, w)."""
        return {title_of(name): maps for name, maps in self.saved.maps.items()}

    @property
    def titles(self) -> Sequence[str]:
        """Those of the methods."""
        return list(self.maps)

    def input(self, image: int) -> Picture:
        """Returns an image in its own size."""
        pixels: Picture = self.saved.pixels[image]
        return pixels

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
            columns[title_of(name)] = self._overlaid(pixels, chosen)
        return columns

    def _overlaid(self, pixels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Lays maps over images, each frame by itself, as no frame reaches into the next."""
        if self.saved.frames == 1:
            drawn = render.overlays(pixels, render.heatmaps(maps, pixels.shape[1:-1]), self.saved.colormap)
            return render.say_uniform(drawn, maps)
        clips = pixels.unflatten(2, (self.saved.frames, -1)).movedim(2, 1)
        heat = render.heatmaps(maps.unflatten(2, (self.saved.frames, -1)).movedim(2, 1), clips.shape[1:-1])
        drawn = render.overlays(clips, heat, self.saved.colormap)
        return render.say_uniform(drawn.movedim(1, 2).flatten(2, 3), maps)


class FromGrids:
    """Takes logged grids apart.

    Args:
        grids: step -> the grid that was logged there, as the bytes of a picture file.
        methods: names of those that there may be.
        place: of the run.

    Raises:
        VitxError: One of the pictures is damaged, or no grid.
    """

    def __init__(self, grids: Mapping[int, bytes], methods: Iterable[str], place: Path) -> None:
        self.steps: Sequence[int] = tuple(sorted(grids))
        self._encoded, self._place = [grids[step] for step in self.steps], place
        kinds = [self._kind(firing) for firing in range(len(self.steps))]
        if len({shape for shape, _, _ in kinds}) > 1:
            raise VitxError("the logged pictures changed their size: keep those of one training")
        self.count = min(count for _, count, _ in kinds)
        columns = min(columns for _, _, columns in kinds)
        known = ("input", *map(title_of, methods))
        self._columns = read_titles(self._seen(-1)[0], known)[:columns]
        self.titles: Sequence[str] = self._columns[1:]

    def input(self, image: int) -> Picture:
        """Cuts an image out as it was shown last."""
        return self._rows(-1)[image].tiles[0]

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """Cuts one image out, title -> picture."""
        return dict(zip(self._columns, self._rows(firing)[image].tiles, strict=False))

    def caption(self, firing: int, image: int) -> Picture:
        """Cuts the line of text out."""
        return self._rows(firing)[image].caption

    def captions(self, firing: int) -> Sequence[Picture]:
        """Cuts the lines of text out."""
        return [row.caption for row in self._rows(firing)[: self.count]]

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """Joins the rows of some images anew, between the titles and the legend."""
        grid, cut_out = self._seen(firing)
        height = len(cut_out[0].caption) + len(cut_out[0].tiles[0]) + render.GAP
        legend = grid[render.LINE + height * len(cut_out) :]
        tops = [render.LINE + image * height for image in images]
        rows = [grid[top : top + height] for top in tops]
        return np.concatenate([grid[: render.LINE], *rows, legend])

    def _kind(self, firing: int) -> tuple[tuple[int, ...], int, int]:
        """The shape of the pictures at a firing, how many images there are, and how many columns."""
        rows = self._rows(firing)
        return rows[0].tiles[0].shape, len(rows), len(rows[0].tiles)

    def _rows(self, firing: int) -> list[Row]:
        return self._seen(firing)[1]

    def _seen(self, firing: int) -> tuple[Picture, list[Row]]:
        """A grid and its rows; it is a hundred times as large as its file, so few are held at once."""
        step = self.steps[firing]
        return _decode_and_cut(self._encoded[firing], f"the picture that {self._place} logged at step {step}")


@lru_cache(maxsize=8)
def _decode_and_cut(picture: bytes, what: str) -> tuple[Picture, list[Row]]:
    grid = decode(picture, what)
    return grid, cut(grid)


class NoPictures:
    """Of a run that logged numbers alone."""

    steps: Sequence[int] = ()
    titles: Sequence[str] = ()
    count = 0

    def input(self, image: int) -> Picture:
        """There are none."""
        raise IndexError(image)

    def tiles(self, firing: int, image: int) -> dict[str, Picture]:
        """There are none."""
        raise IndexError(image)

    def caption(self, firing: int, image: int) -> Caption:
        """There are none."""
        raise IndexError(image)

    def captions(self, firing: int) -> Sequence[Caption]:
        """There are none."""
        raise IndexError(firing)

    def grid(self, firing: int, images: Sequence[int], tile_width: int = render.TILE_WIDTH) -> Picture:
        """There are none."""
        raise IndexError(firing)
