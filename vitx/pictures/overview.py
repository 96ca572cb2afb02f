"""Overviews of many maps: mean maps, and crops around the brightest patches, show what pictures share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.pictures import render
from vitx.pictures.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH, Picture

SAID = (
    "Bright: looked at most. A mean map that is bright at one place, or crops that show the same thing, are "
    "a question, not a verdict: photographers center their objects."
)
Classes = Sequence[str | None]  # the class name of each image

_CLASSES, _CROPS = 10, 24
_ACROSS, _CROPS_ACROSS = 6, 8
_WIDTH = _ACROSS * (TILE_WIDTH + GAP) + GAP
_CROP = (_WIDTH - GAP) // _CROPS_ACROSS - GAP  # pixels
_PATCHES, _SHARE = 3, 4  # a crop is at least 3 patches and 1/4 of the picture wide


@dataclass
class _Mean:
    """The mean of maps that each sum to 1, and of their pictures at the width of a tile."""

    count: int = 0
    map: Any = 0.0  # the sum of the maps, a tensor once there is one
    pixels: Any = 0.0  # the sum of the pictures, likewise

    def add(self, pixels: Tensor, map_: Tensor) -> None:
        self.count += 1
        self.map, self.pixels = self.map + map_, self.pixels + pixels

    def tile(self, colormap: str) -> Picture:
        pixels = (self.pixels / self.count).round().to(torch.uint8)[None]
        heat = render.heatmaps(self.map[None], tuple(pixels.shape[1:3]))
        return render.overlays(pixels, heat, colormap)[0].numpy()


class Overview:
    """A collection of pictures and their maps, which are added one by one and drawn all at once."""

    def __init__(self) -> None:
        self._all, self._classes = _Mean(), dict[str, _Mean]()
        self._crops: list[Picture] = []  # in the order of their pictures
        self._seen, self._random = 0, random.Random(0)

    def add(self, pixels: Tensor, map_: Tensor, name: str | None = None) -> None:
        """Add a picture, (H, W, 3) uint8, its map, (h, w), of any size, and the name of its class."""
        if pixels.ndim != 3 or map_.ndim != 2:
            said = "an overview needs pictures with one map each, not clips, volumes or spectrograms"
            raise VitxError(f"{said}: found pixels {tuple(pixels.shape)} and a map {tuple(map_.shape)}")
        pixels, map_ = pixels.cpu(), map_.cpu().float()
        height, width = (self._all.map if self._all.count else map_).shape
        share = F.adaptive_avg_pool2d(map_[None], (height, width))[0]  # a no-op if it has this size
        share = share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)
        small = torch.from_numpy(_resized(pixels, TILE_WIDTH)).float()
        self._all.add(small, share)
        if name is not None:
            self._classes.setdefault(name, _Mean()).add(small, share)
        if map_.amax() > map_.amin():  # a constant map has no brightest patch
            self._take_crop(pixels, map_)

    def _take_crop(self, pixels: Tensor, map_: Tensor) -> None:
        """Keep the crops of 24 pictures by reservoir sampling: each picture is equally likely to be kept."""
        self._seen += 1
        if self._seen > _CROPS:
            other = self._random.randrange(self._seen)
            if other >= _CROPS:
                return
            del self._crops[other]
        self._crops.append(_resized(crop(pixels, map_), _CROP))

    def draw(self, colormap: str = "inferno", title: str = "") -> Picture:
        """Draw the mean maps over the mean pictures, and the crops below; `title` names the method."""
        means, of = [("all", self._all)], "all pictures"
        if len(self._classes) > 1:
            most = sorted(self._classes.items(), key=lambda one: -one[1].count)[:_CLASSES]
            means += most
            ten = f"the {len(most)} most frequent classes" if len(self._classes) > len(most) else "each class"
            of = f"{of}, and of {ten} (number of pictures)"
        tiles = [(f"{name} ({mean.count})", mean.tile(colormap)) for name, mean in means]
        parts = [_heading(f"{title}: mean map of {of}" if title else f"Mean map of {of}")]
        parts.append(_table(tiles, TILE_WIDTH, _ACROSS))
        if crops := [("", one) for one in self._crops]:  # none if all maps are constant
            count = f"{len(crops)} of {self._seen} pictures" if self._seen > len(crops) else "each picture"
            parts += [_heading(f"Crops around the brightest patch of {count}")]
            parts += [_table(crops, _CROP, _CROPS_ACROSS)]
        parts += [_heading(line, FAINT) for line in render.wrapped(SAID, _WIDTH - 2 * GAP)]
        return np.concatenate(parts)


def overview_of(
    pixels: Tensor, maps: Tensor, names: Classes | None = None, colormap: str = "inferno", title: str = ""
) -> Picture:
    """Draw an overview of pictures, (B, H, W, 3) uint8, their maps, (B, h, w), and their classes."""
    found = Overview()
    for one, map_, name in zip(pixels, maps, names or [None] * len(maps), strict=True):
        found.add(one, map_, name)
    return found.draw(colormap, title)


def crop(pixels: Tensor, map_: Tensor) -> Tensor:
    """Crop a square around the brightest patch, within the picture: (side, side, 3)."""
    sizes = pixels.shape[:2]
    peak = torch.unravel_index(map_.argmax(), map_.shape)
    patch = max(size / count for size, count in zip(sizes, map_.shape, strict=True))
    side = min(round(max(_PATCHES * patch, min(sizes) / _SHARE)), *sizes)
    top, left = (
        min(max(0, round((int(place) + 0.5) * size / count - side / 2)), size - side)
        for place, count, size in zip(peak, map_.shape, sizes, strict=True)
    )
    return pixels[top : top + side, left : left + side]


def _resized(pixels: Tensor, width: int) -> Picture:
    """Resize a picture to a square, which distorts it only if the input of the model is not square."""
    return np.array(Image.fromarray(pixels.numpy()).resize((width, width), Image.Resampling.BICUBIC))


def _heading(text: str, color: str = INK) -> Picture:
    canvas = Image.new("RGB", (_WIDTH, LINE + 2), PAPER)
    render.write(ImageDraw.Draw(canvas), (GAP, 3), text, color, _WIDTH - 2 * GAP, bold=color == INK)
    return np.asarray(canvas)


def _table(tiles: Sequence[tuple[str, Picture]], width: int, across: int) -> Picture:
    """Arrange tiles side by side in rows, each under its title if any tile has one."""
    head = LINE if any(title for title, _ in tiles) else 0
    row = head + width + GAP
    canvas = Image.new("RGB", (_WIDTH, -(-len(tiles) // across) * row), PAPER)
    draw = ImageDraw.Draw(canvas)
    for place, (title, tile) in enumerate(tiles):
        left, top = GAP + place % across * (width + GAP), place // across * row
        render.write(draw, (left, top + 3), title, FAINT, width)
        canvas.paste(Image.fromarray(tile), (left, top + head))
    return np.asarray(canvas)
