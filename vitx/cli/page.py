"""Both pages of `vitx report`: the templates, and pictures small enough that many of them stand in a page."""

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vitx.evaluation.metrics import entropy
from vitx.pictures.captions import Caption
from vitx.pictures.render import OVERLAY_STRENGTH, Picture, heatmaps, palette
from vitx.pictures.views import UNIFORM
from vitx.runs.run import Run
from vitx.viewer.page import data_uri
from vitx.viewer.page import template as template_of

_EDGE = 1  # pixels of a frame that are repeated around it, as a browser that enlarges it mixes neighbours
_STOPS = 65  # of a color map, between which a browser interpolates


class Embedded(NamedTuple):
    """A picture in a page: all its bytes as an address, and its size in pixels; of a film, of one frame."""

    uri: str
    width: int
    height: int


class Shown(NamedTuple):
    """One image of a run at some firings.

    A film has the maps of a method, by its title, to be colored and laid over the input: frames of one size,
    row by row, of which a page shows one at a time.
    """

    films: dict[str, Embedded]
    last: Caption
    said: list[list[Any]]  # beside each frame: caption, whether it is right, places of nearly uniform maps
    colormap: str


def fill(template: str, *, frames: int, colormaps: Sequence[str], **values: Any) -> str:
    """Fill a template of the folder `pages`, and return HTML."""
    page = template_of("vitx.cli", "pages", f"{template}.html.jinja")
    stops = np.linspace(0, 255, _STOPS).round().astype(int)
    # An SVG filter makes these values of red, green and blue of grey.
    tables = {
        name: [" ".join(f"{one:.3g}" for one in channel) for channel in (palette(name)[stops] / 255).T]
        for name in colormaps
    }
    columns = columns_of(frames)
    return page.render(tables=tables, frames=frames, columns=columns, strength=OVERLAY_STRENGTH, **values)


def columns_of(count: int) -> int:
    """Return how many frames of a film stand side by side."""
    return ceil(sqrt(count))


def show(run: Run, firings: Sequence[int], titles: Sequence[str]) -> list[Shown]:
    """Encode each image at some firings, by methods of these titles.

    The browser lays a small map over the input itself: that takes a hundredth of the bytes of an overlay.
    """
    captions = [run.captions(firing) for firing in firings]
    found = []
    for image in range(run.count):
        maps = [torch.from_numpy(run.maps[title][list(firings), image]) for title in titles]
        flat = zip(*((entropy(one) > UNIFORM).tolist() for one in maps), strict=True)
        said = [
            [str(of_all[image]), of_all[image].right, *(place for place, of in enumerate(which) if of)]
            for of_all, which in zip(captions, flat, strict=True)
        ]
        films = dict(zip(titles, map(_film, maps), strict=True))
        found.append(Shown(films, captions[-1][image], said, run.colormap))
    return found


def _film(maps: torch.Tensor) -> Embedded:
    """Join maps, (n, h, w), each scaled from 0 to 255, row by row in one picture."""
    count, height, width = maps.shape
    frames = (heatmaps(maps, (height, width)) * 255).round().byte().numpy()
    columns = columns_of(count)
    rows = ceil(count / columns)
    edged = np.pad(frames, [(0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE)], mode="edge")
    full = np.pad(edged, [(0, rows * columns - count), (0, 0), (0, 0)])
    table = full.reshape(rows, columns, *full.shape[1:]).swapaxes(1, 2)
    sheet = table.reshape(rows * (height + 2 * _EDGE), columns * (width + 2 * _EDGE))
    return png(sheet)._replace(width=width, height=height)


def png(picture: Picture) -> Embedded:
    """Encode a drawing, (height, width) or (height, width, 3) uint8, without loss."""
    uri = data_uri(Image.fromarray(picture), "PNG", optimize=True)
    return Embedded(uri, picture.shape[1], picture.shape[0])


def photo(picture: Picture) -> Embedded:
    """Encode a photograph, (height, width, 3) uint8, with little loss."""
    uri = data_uri(Image.fromarray(picture), "JPEG", quality=90, subsampling=0)
    return Embedded(uri, picture.shape[1], picture.shape[0])
