"""Pictures that stand in a page, small enough that many of them do."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vitx.render import heatmaps, palette
from vitx.runs.playback import FromMaps, Picture, Playback

_FINER = 4  # pixels of an embedded map for each patch; the browser smooths the rest


@dataclass(frozen=True)
class Layers:
    """One image at some firings, each picture as a data URI.

    Attributes:
        input: the image.
        titles: of the methods.
        pictures: for each firing, one for each method.
        layered: whether they are maps, to be laid over the input, or whole overlays.
        shape: height and width of the image in pixels.
    """

    input: str
    titles: list[str]
    pictures: list[list[str]]
    layered: bool
    shape: tuple[int, int]


def layers(playback: Playback, image: int, firings: Sequence[int]) -> Layers:
    """Encodes one image at some firings.

    The browser lays a small map over the input itself: that takes a hundredth of the bytes of an overlay.
    """
    first = playback.tiles(firings[0], image)
    start, *titles = first
    pixels = first[start]
    height, width = pixels.shape[:2]
    if isinstance(playback, FromMaps):
        pictures = [_maps(playback, image, firing) for firing in firings]
        return Layers(photo(pixels), titles, pictures, True, (height, width))
    drawn = [playback.tiles(firing, image) for firing in firings]
    pictures = [[photo(tiles[title]) for title in titles] for tiles in drawn]
    return Layers(photo(pixels), titles, pictures, False, (height, width))


def _maps(playback: FromMaps, image: int, firing: int) -> list[str]:
    saved = playback.saved
    found = []
    for maps in saved.maps.values():
        one = torch.from_numpy(maps[firing, image])[None]
        heat = heatmaps(one, (_FINER * one.shape[1], _FINER * one.shape[2]))[0]
        picture = Image.fromarray((heat * 255).round().byte().numpy(), "L")
        picture = picture.convert("P")
        picture.putpalette(palette(saved.colormap).tobytes())
        found.append(_uri(picture, "PNG", optimize=True))
    return found


def png(picture: Picture) -> str:
    """Encodes a drawing, (height, width, 3) uint8, without loss."""
    return _uri(Image.fromarray(picture), "PNG", optimize=True)


def photo(picture: Picture) -> str:
    """Encodes a photograph, (height, width, 3) uint8, with little loss."""
    return _uri(Image.fromarray(picture), "JPEG", quality=90, subsampling=0)


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    written = io.BytesIO()
    picture.save(written, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"
