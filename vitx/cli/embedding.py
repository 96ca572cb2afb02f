"""Pictures that stand in a page, small enough that many of them do."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitx.metrics import entropy
from vitx.pictures.captions import Caption
from vitx.pictures.render import GAP, UNIFORM, palette
from vitx.runs.playback import FromMaps, Picture, Playback

_EDGE = 1  # pixels of a frame that are repeated around it, as a browser that enlarges it mixes neighbours
_STOPS = 65  # of a colour map, between which a browser interpolates


@dataclass(frozen=True)
class Film:
    """Frames of one size in one picture, row by row, of which a page shows one at a time.

    Attributes:
        uri: the picture, as a data URI.
        width: of a frame in pixels, without its edge.
        height: the same.
    """

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """One image of a run at some firings.

    Attributes:
        films: title of each method -> its maps, to be coloured and laid over the input, or whole overlays.
        coloured: whether they are such overlays.
        said: the caption of each firing, where they are known in words.
        strip: the captions as pictures, where they are not.
        flat: title of each method -> for each firing, whether its map is nearly uniform.
    """

    films: dict[str, Film]
    coloured: bool
    said: list[Caption]
    strip: Film | None
    flat: dict[str, list[bool]]

    def in_order(self, titles: Sequence[str]) -> "Shown":
        """Returns the same with the methods in another order."""
        films = {title: self.films[title] for title in titles}
        return replace(self, films=films, flat={title: self.flat[title] for title in titles if self.flat})


def columns_of(count: int) -> int:
    """Returns how many frames of a film stand side by side."""
    return ceil(sqrt(count))


def show(playback: Playback, firings: Sequence[int]) -> list[Shown]:
    """Encodes each image at some firings.

    The browser lays a small map over the input itself: that takes a hundredth of the bytes of an overlay.
    """
    # Firing by firing, as a logged grid has all images.
    captions = [playback.captions(firing) for firing in firings]
    if isinstance(playback, FromMaps):
        return [_from_maps(playback, image, firings, captions) for image in range(playback.count)]
    images = range(playback.count)
    drawn = [[playback.tiles(firing, image) for image in images] for firing in firings]
    found = []
    for image in images:
        films = {
            title: _film(np.stack([tiles[image][title] for tiles in drawn]), _photos)
            for title in playback.titles
        }
        lines = np.stack([np.asarray(of_all[image]) for of_all in captions])
        found.append(Shown(films, True, [], _film(_without_margin(lines), _drawing), {}))
    return found


def _from_maps(
    playback: FromMaps, image: int, firings: Sequence[int], captions: Sequence[Sequence[Any]]
) -> Shown:
    maps = {title: torch.from_numpy(m[list(firings), image]) for title, m in playback.maps.items()}
    flat = {title: (entropy(found) > UNIFORM).tolist() for title, found in maps.items()}
    films = {title: _film(_levels(found), _grey) for title, found in maps.items()}
    return Shown(films, False, [of_all[image] for of_all in captions], None, flat)


def _without_margin(lines: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cuts off what is empty right of some lines of text, (n, h, w, 3)."""
    used = (lines < 255).any((0, 1, 3)).nonzero()[0]
    return lines[:, :, : used.max(initial=GAP) + GAP]


def _levels(maps: torch.Tensor) -> NDArray[np.uint8]:
    """Scales each of some maps, (n, h, w), from 0 to 255; one that is constant to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    scaled = ((maps - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)
    return (scaled * 255).round().byte().numpy()


def _film(frames: NDArray[np.uint8], encode: Callable[[Image.Image], str]) -> Film:
    """Joins frames, (n, h, w) or (n, h, w, 3)."""
    count, height, width = frames.shape[:3]
    columns = columns_of(count)
    rows = ceil(count / columns)
    others = [(0, 0)] * (frames.ndim - 3)
    edged = np.pad(frames, [(0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE), *others], mode="edge")
    full = np.pad(edged, [(0, rows * columns - count), (0, 0), (0, 0), *others])
    table = full.reshape(rows, columns, *full.shape[1:]).swapaxes(1, 2)
    sheet = table.reshape(rows * (height + 2 * _EDGE), columns * (width + 2 * _EDGE), *frames.shape[3:])
    return Film(encode(Image.fromarray(sheet)), width, height)


def filter_table(colormap: str) -> list[str]:
    """Returns what an SVG filter makes of grey: the values of red, green and blue, each from 0 to 1."""
    chosen = palette(colormap)[np.linspace(0, 255, _STOPS).round().astype(int)] / 255
    return [" ".join(f"{value:.3g}" for value in channel) for channel in chosen.T]


def png(picture: Picture) -> str:
    """Encodes a drawing, (height, width, 3) uint8, without loss."""
    return _uri(Image.fromarray(picture), "PNG", optimize=True)


def photo(picture: Picture) -> str:
    """Encodes a photograph, (height, width, 3) uint8, with little loss."""
    return _uri(Image.fromarray(picture), "JPEG", quality=90, subsampling=0)


def _drawing(picture: Image.Image) -> str:
    """Encodes a line of text in few colours."""
    return _uri(picture.quantize(8, dither=Image.Dither.NONE), "PNG", optimize=True)


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"


_grey = partial(_uri, kind="PNG", optimize=True)
_photos = partial(_uri, kind="WEBP", quality=75)
