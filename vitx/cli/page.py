"""Both pages of `vitx report`: the templates, and pictures small enough that many of them stand in a page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitx.evaluation.metrics import entropy
from vitx.pictures.captions import Caption
from vitx.pictures.render import OVERLAY_STRENGTH, palette
from vitx.pictures.views import UNIFORM
from vitx.runs.run import Picture, Run
from vitx.viewer.page import data_uri
from vitx.viewer.page import template as template_of

_EDGE = 1  # pixels of a frame that are repeated around it, as a browser that enlarges it mixes neighbours
_STOPS = 65  # of a color map, between which a browser interpolates


class Embedded(NamedTuple):
    """A picture in a page: all its bytes as an address, and its size in pixels; of a film, of one frame."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """One image of a run at some firings.

    Attributes:
        films: title of each method -> its maps, to be colored and laid over the input: frames of one size,
            row by row, of which a page shows one at a time.
        captions: one for each firing.
        flat: title of each method -> for each firing, whether its map is nearly uniform.
        colormap: that of the run.
    """

    films: dict[str, Embedded]
    captions: list[Caption]
    flat: dict[str, list[bool]]
    colormap: str

    def in_order(self, titles: Sequence[str]) -> "Shown":
        """Return the same with the methods in another order."""
        films = {title: self.films[title] for title in titles}
        return replace(self, films=films, flat={title: self.flat[title] for title in titles})

    @property
    def said(self) -> list[list[Any]]:
        """The words beside each frame: the caption, whether it is right, and which maps are flat."""
        flat = zip(*self.flat.values(), strict=True)
        return [
            [str(caption), caption.right, *(place for place, of in enumerate(of_all) if of)]
            for caption, of_all in zip(self.captions, flat, strict=True)
        ]


def fill(template: str, *, frames: int, colormaps: Sequence[str], **values: Any) -> str:
    """Fill a template of the folder `pages`, and return HTML."""
    page = template_of("vitx.cli", "pages", f"{template}.html.jinja")
    stops = np.linspace(0, 255, _STOPS).round().astype(int)
    # An SVG filter makes these values of red, green and blue of grey.
    tables = {
        name: [" ".join(f"{one:.3g}" for one in channel) for channel in (palette(name)[stops] / 255).T]
        for name in colormaps
    }
    shared = {"frames": frames, "columns": columns_of(frames), "strength": OVERLAY_STRENGTH}
    return page.render(tables=tables, **shared, **values)


def columns_of(count: int) -> int:
    """Return how many frames of a film stand side by side."""
    return ceil(sqrt(count))


def show(run: Run, firings: Sequence[int]) -> list[Shown]:
    """Encode each image at some firings.

    The browser lays a small map over the input itself: that takes a hundredth of the bytes of an overlay.
    """
    captions = [run.captions(firing) for firing in firings]
    found = []
    for image in range(run.count):
        maps = {title: torch.from_numpy(m[list(firings), image]) for title, m in run.maps.items()}
        flat = {title: (entropy(one) > UNIFORM).tolist() for title, one in maps.items()}
        films = {title: _film(_levels(one)) for title, one in maps.items()}
        found.append(Shown(films, [of_all[image] for of_all in captions], flat, run.colormap))
    return found


def _levels(maps: torch.Tensor) -> NDArray[np.uint8]:
    """Scale each of some maps, (n, h, w), from 0 to 255; one that is constant to 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    scaled = ((maps - low) / (high - low).masked_fill(flat, 1)).masked_fill(flat, 0)
    return (scaled * 255).round().byte().numpy()


def _film(frames: NDArray[np.uint8]) -> Embedded:
    """Join frames, (n, h, w), row by row in one picture."""
    count, height, width = frames.shape
    columns = columns_of(count)
    rows = ceil(count / columns)
    edged = np.pad(frames, [(0, 0), (_EDGE, _EDGE), (_EDGE, _EDGE)], mode="edge")
    full = np.pad(edged, [(0, rows * columns - count), (0, 0), (0, 0)])
    table = full.reshape(rows, columns, *full.shape[1:]).swapaxes(1, 2)
    sheet = table.reshape(rows * (height + 2 * _EDGE), columns * (width + 2 * _EDGE))
    return png(sheet)._replace(width=width, height=height)


def png(picture: Picture) -> Embedded:
    """Encode a drawing, (height, width) or (height, width, 3) uint8, without loss."""
    return _embedded(picture, "PNG", optimize=True)


def photo(picture: Picture) -> Embedded:
    """Encode a photograph, (height, width, 3) uint8, with little loss."""
    return _embedded(picture, "JPEG", quality=90, subsampling=0)


def _embedded(picture: Picture, kind: str, **options: Any) -> Embedded:
    uri = data_uri(Image.fromarray(picture), kind, **options)
    return Embedded(uri, picture.shape[1], picture.shape[0])
