"""The page: one self-contained file with pictures, maps and attention."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vitx.files import write_or_say
from vitx.pictures.render import OVERLAY_STRENGTH, SIGNED, palette
from vitx.pictures.views import BOX, SINKS
from vitx.viewer.packing import encoded

_PALETTES = "inferno", "viridis", "cividis", "gray"
_EDGE = {True: 448, False: 224}  # pixels, longer side: of a single picture, and of each of several frames
_MOST_COLUMNS = 4  # of frames
_GAP = 6  # pixels between frames


@dataclass(frozen=True, repr=False)
class Page:
    """A page that notebooks display and `save` writes."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write the page as one file."""
        write_or_say(Path(path), lambda file: file.write(self.html.encode()))

    def _repr_html_(self) -> str:
        source = html.escape(self.html)
        return f'<iframe srcdoc="{source}" style="width: 100%; height: 56rem; border: 0"></iframe>'


def page(name: str, images: Sequence[Mapping[str, Any]], methods: Sequence[tuple[str, str]]) -> Page:
    """Fill the template with the name of a model, its images, and the names and titles of methods."""
    tables = {one: encoded(torch.from_numpy(palette(one))) for one in (*_PALETTES, SIGNED[0])}
    data = {"images": images, "methods": methods, "palettes": tables}
    look = {"palettes": _PALETTES, "signed": SIGNED[0], "strength": OVERLAY_STRENGTH, "rings": SINKS}
    return Page(filled("vitx.viewer", ".", "page.html.jinja", name=name, data=data, ring=BOX, **look))


def sheet(pixels: NDArray[np.uint8], frames: int) -> dict[str, Any]:
    """Draw a picture, (H, W, 3), or some frames of a clip, (T, H, W, 3), and describe their layout."""
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
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
    cells = {"step": step, "width": width, "height": height, "frames": frames, "columns": columns}
    return {"picture": data_uri(whole, "JPEG", quality=85), "sheet": whole.size, **cells}


def filled(package: str, folder: str, template: str, /, **values: Any) -> str:
    """Fill an HTML template from a package; raise an error for a name without a value."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    known = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    known.loader = PackageLoader(package, folder)
    return known.get_template(template).render(values)


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    """Encode a picture as a data URI, in a format of Pillow with its options."""
    written = BytesIO()
    picture.save(written, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"
