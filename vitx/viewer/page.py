"""The page: one self-contained file with pictures, maps and attention, and how it encodes them."""

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
from torch import Tensor

from vitx.files import write_or_say
from vitx.pictures.render import OVERLAY_STRENGTH, SIGNED, palette
from vitx.pictures.views import BOX, SINKS

_PALETTES = "inferno", "viridis", "cividis", "gray"
_EDGE = {True: 448, False: 224}  # pixels, longer side: of a single picture, and of each of several frames
_MOST_COLUMNS = 4  # of frames
_GAP = 6  # pixels between frames
_PRECISION = 1 / 600  # of log A: the ratio of two entries of A is then right within 1/255
_SPARE = 8  # columns beyond the channels of a head: for row sums, and to find the others reliably
_TOP = 2.0**15  # scale of the largest number: float16 also holds nine orders of magnitude below it


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


def packed(weights: Tensor, channels: int) -> dict[str, Any]:
    """Pack A of all heads, (T, H, Q, K), with this many channels each, for `page.html.jinja` to unpack.

    The scores of an attention are q k^T, so log A has a low rank: that of q, plus one for the row sums, plus
    that of a bias. Two thin integer matrices hold it, however the model computes A. If they are not smaller,
    as in windows, or not exact, as with masks, A itself is stored as float16.
    """
    flat = weights.flatten(0, 1).float().cpu()
    return {"heads": weights.shape[1], **(_factors(flat, channels + _SPARE) or halves(flat))}


def most_bytes(shape: Sequence[int], channels: int) -> int:
    """Return the most bytes of base64 that A of this shape, (T, H, Q, K), can take."""
    windows, heads, queries, keys = shape
    entries = min(queries * keys, (queries + keys) * (channels + _SPARE))
    return windows * heads * entries * 2 * 4 // 3


def _factors(weights: Tensor, rank: int) -> dict[str, Any] | None:
    """Return log A as a product of two thin matrices; None if that is not smaller, or not exact."""
    _, queries, keys = weights.shape
    if rank * (queries + keys) >= queries * keys or bool((weights <= 0).any()):
        return None
    logs = weights.log()
    sides = _thin(logs, rank)
    sizes = [side.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2**15 - 1) for side in sides]
    left, right = ((side / size).round() for side, size in zip(sides, sizes, strict=True))
    units = sizes[0] * sizes[1]
    if float((left * units @ right.mT - logs).abs().amax()) > _PRECISION:
        return None
    matrices = {"left": encoded(left.short()), "right": encoded(right.short())}
    return {"columns": left.shape[2], "units": encoded(units[:, 0]), **matrices}


def _thin(logs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return two thin matrices whose product approximates this one.

    They are found by a random projection (Halko et al. 2011), if the rank is below the given one.
    """
    seed = torch.Generator().manual_seed(0)
    probes = torch.randn(len(logs), logs.shape[2], rank, generator=seed, device="cpu")
    basis = torch.linalg.qr(logs @ probes).Q
    left, sizes, right = torch.linalg.svd(basis.mT @ logs, full_matrices=False)
    left, right = basis @ left * sizes.sqrt()[:, None], right.mT * sizes.sqrt()[:, None]
    kept = (left.abs().amax(1) * right.abs().amax(1)).amax(0) > _PRECISION / 20
    return left[..., kept], right[..., kept]


def halves(numbers: Tensor) -> dict[str, Any]:
    """Pack numbers as float16, with the unit in which they are stored."""
    numbers = numbers.detach().float().cpu()
    largest = float(numbers.abs().amax()) or 1.0
    return {"unit": largest / _TOP, "whole": encoded((numbers * (_TOP / largest)).half())}


def encoded(numbers: Tensor) -> str:
    """Return the little-endian bytes of numbers in base64."""
    array = numbers.detach().cpu().contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
