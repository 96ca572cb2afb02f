"""The page: one file that holds pictures, maps and attention, and needs nothing else."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitx.files import write_or_say
from vitx.pictures.embedding import data_uri, template
from vitx.viewer.packing import encoded

_PALETTES = "inferno", "viridis", "cividis", "gray"
_EDGE = {True: 448, False: 224}  # pixels of a picture, if there is one, and of each of several frames
_MOST_COLUMNS = 4  # of frames
_GAP = 6  # pixels between frames


@dataclass(frozen=True, repr=False)
class Page:
    """A page that a notebook shows, and that `save` writes."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write it as one file.

        Raises:
            VitxError: The file cannot be written.
        """
        write_or_say(Path(path), lambda file: file.write(self.html.encode()))

    def _repr_html_(self) -> str:
        source = html.escape(self.html)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: 56rem; border: 0"></iframe>'


def page(name: str, images: Sequence[Mapping[str, Any]], methods: Sequence[tuple[str, str]]) -> Page:
    """Fill the template with the name of a model, its images, and the names and titles of methods."""
    from vitx.pictures.marks import BOX, SINKS
    from vitx.pictures.render import OVERLAY_STRENGTH, SIGNED, palette

    tables = {one: encoded(torch.from_numpy(palette(one))) for one in (*_PALETTES, SIGNED[0])}
    data = {"images": images, "methods": methods, "palettes": tables}
    filled = template("vitx.viewer", ".", "page.html.jinja").render(
        name=name,
        data=data,
        palettes=_PALETTES,
        signed=SIGNED[0],
        strength=OVERLAY_STRENGTH,
        rings=SINKS,
        ring=BOX,
    )
    return Page(filled)


def sheet(pixels: NDArray[np.uint8], frames: int) -> dict[str, Any]:
    """Draw a picture, (H, W, 3), or so many frames of a clip, (T, H, W, 3), and say how they lie."""
    from PIL import Image

    if pixels.ndim == 3:
        pixels = pixels[None]
    frames = min(frames, len(pixels))
    places = [int((at + 0.5) * len(pixels) / frames) for at in range(frames)]
    edge = _EDGE[frames == 1]
    zoom = edge / max(pixels.shape[1:3])
    width, height = (max(1, round(zoom * size)) for size in pixels.shape[2:0:-1])
    columns = min(frames, _MOST_COLUMNS)
    step = (width + _GAP, height + _GAP)
    whole = Image.new("RGB", (columns * step[0] - _GAP, ceil(frames / columns) * step[1] - _GAP), "gray")
    way = Image.Resampling.LANCZOS if zoom < 2 else Image.Resampling.NEAREST
    for number, place in enumerate(places):
        tile = Image.fromarray(pixels[place]).resize((width, height), way)
        whole.paste(tile, (number % columns * step[0], number // columns * step[1]))
    return {
        "picture": data_uri(whole, "JPEG", quality=85),
        "sheet": whole.size,
        "step": step,
        "width": width,
        "height": height,
        "frames": frames,
        "columns": columns,
    }
