"""Clips, volumes and spectrograms as flat pictures: a few slices side by side, their maps below."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs.clips import evenly
from vitx.pictures.marks import SINKS, outlined, ringed, say_uniform
from vitx.pictures.render import heatmaps, overlays, scaled_up, signed_overlays

View = Literal["frames", "planes"]
MOST_FRAMES = 8
_PICTURE = 224  # pixels
_NARROWEST, _WIDEST = 448, 1344  # pixels of a strip
_GAP, _PAPER = 2, 255  # pixels between slices, and their colour


class Slices(NamedTuple):
    """The parts of a clip, volume or spectrogram that are shown.

    Attributes:
        said: a few words for a title.
        cut: from pixels, (..., 3), and their brightest place to parts, (h, w, 3) each.
    """

    said: str
    cut: Callable[[Tensor, tuple[int, ...]], Sequence[Tensor]]


@dataclass(frozen=True)
class Layer:
    """Maps of some images, with the boxes and sinks that are marked in them.

    Attributes:
        maps: (B, ...), >= 0.
        signed: the same with signs; None for methods without.
        boxes: (B, 4), in pixels of the images, or None.
        sinks: (B, h, w) bool, or None.
    """

    maps: Tensor
    signed: Tensor | None = None
    boxes: Tensor | None = None
    sinks: Tensor | None = None

    def at(self, places: list[int]) -> "Layer":
        """Return the maps of the images at some places."""
        others = (one if one is None else one[places] for one in (self.signed, self.boxes, self.sinks))
        return Layer(self.maps[places], *others)

    @property
    def has_sinks(self) -> bool:
        """Return whether any patch is marked."""
        return self.sinks is not None and bool(self.sinks.any())

    def over(self, pixels: Tensor, colormap: str, signed: bool) -> Tensor:
        """Lay the maps over images, (B, ..., 3) uint8."""
        if signed:
            return signed_overlays(pixels, self.maps if self.signed is None else self.signed)
        return overlays(pixels, heatmaps(self.maps, tuple(pixels.shape[1:-1])), colormap)

    def marked(self, drawn: Tensor, size: tuple[int, ...]) -> Tensor:
        """Mark boxes, in images of a size, and sinks."""
        drawn = drawn if self.boxes is None else outlined(drawn, self.boxes, size)
        return ringed(drawn, self.sinks) if self.sinks is not None and self.has_sinks else drawn

    def said(self, drawn: Tensor) -> Tensor:
        """Stamp maps that are nearly uniform, or all against."""
        return say_uniform(drawn, self.maps, self.signed)


def slices_of(
    size: tuple[int, ...],
    channels: int | None,
    view: View | None = None,
    time_axis: int | None = None,
    most_frames: int = MOST_FRAMES,
) -> Slices | None:
    """Choose the slices that are shown; None for a picture, which is shown whole.

    Args:
        size: (H, W) of a picture, (T, H, W) of a clip, (D, H, W) of a volume, (F, T) of a spectrogram.
        channels: how many there are; None: it is a spectrogram.
        view: "frames", evenly spaced, or "planes", the three through the brightest place; by default frames
            where there are three channels.
        time_axis: of a spectrogram (B, F, T) or (B, T, F), the dimension of time; by default the longer one.
        most_frames: how many are shown.

    Raises:
        VitxError: There is no such view or axis.
    """
    if len(size) == 2:
        return None if channels is not None else _spectrogram(size, time_axis)
    if view not in ("frames", "planes", None):
        raise VitxError(f"view must be 'frames' or 'planes', found {view!r}")
    if view == "planes" or (view is None and channels != 3):
        said = "the planes through the brightest place"
        return Slices(said, lambda volume, peak: [volume.select(*place) for place in enumerate(peak)])
    shown = evenly(size[0], most_frames)
    numbers = ", ".join(str(number + 1) for number in shown)
    said = f"frames {numbers}" + (f" of {size[0]}" if len(shown) < size[0] else "")
    return Slices(said, lambda clip, _: [clip[number] for number in shown])


def laid_out(
    pixels: Tensor,
    layers: Mapping[str, Layer],
    slices: Slices | None = None,
    colormap: str = "inferno",
    *,
    signed: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Lay maps over images: the input and each of them as columns, or as strips one below the other.

    Boxes and sinks are marked in pictures that are shown whole. Maps that are nearly uniform say so, or that
    all speaks against.

    Args:
        pixels: (B, ..., 3) uint8, on the CPU.
        layers: title -> maps; the brightest place of the first one is looked for.
        slices: that are shown; None: all.
        colormap: the name of a colour map of matplotlib, for maps without a sign.
        signed: show the maps with their signs.

    Returns:
        Title -> (B, height, width, 3) uint8; and a note on the marks for the legend.
    """
    size = tuple(pixels.shape[1:-1])
    first = next(iter(layers.values()))
    drawn = {title: layer.over(pixels, colormap, signed) for title, layer in layers.items()}
    if slices is None:
        shown = pixels if first.boxes is None or len(layers) > 1 else outlined(pixels, first.boxes, size)
        marked = {title: layers[title].marked(one, size) for title, one in drawn.items()}
        said = {title: layers[title].said(one) for title, one in marked.items()}
        return {"input": shown} | said, SINKS if any(layer.has_sinks for layer in layers.values()) else ""
    heat = heatmaps(first.maps, size)
    rows = [strips(pixels, heat, slices)]
    rows += [layers[title].said(strips(one, heat, slices)) for title, one in drawn.items()]
    widest = max(row.shape[2] for row in rows)
    strip = torch.cat([scaled_up(row, widest) for row in rows], 1)
    return {f"{', '.join(('input', *drawn))}: {slices.said}": strip}, ""


def strips(pictures: Tensor, heat: Tensor, slices: Slices) -> Tensor:
    """Set the slices of each picture, (B, ..., 3) uint8, side by side, (B, height, width, 3).

    The heat, (B, ...), tells the brightest place.
    """
    rows = []
    for picture, found in zip(pictures, heat.cpu(), strict=True):
        peak = tuple(int(place) for place in torch.unravel_index(found.argmax(), found.shape))
        parts = slices.cut(picture, peak)
        paper = picture.new_full(
            (max(map(len, parts)) + _GAP, sum(p.shape[1] + _GAP for p in parts), 3), _PAPER
        )
        left = 0
        for part in parts:
            paper[: len(part), left : left + part.shape[1]] = part
            left += part.shape[1] + _GAP
        rows.append(paper)
    return torch.stack(rows)


def tile_width(columns: Mapping[str, Tensor], slices: Slices | None) -> int:
    """Return the width of columns in pixels: a strip is readable, and no wider than a screen."""
    if slices is None:
        return _PICTURE
    return min(max(next(iter(columns.values())).shape[2], _NARROWEST), _WIDEST)


def _spectrogram(size: tuple[int, ...], time_axis: int | None) -> Slices:
    if time_axis not in (None, 1, 2):
        raise VitxError(f"time_axis must be 1 or 2, a dimension of a spectrogram, found {time_axis!r}")
    turned = time_axis == 1 or (time_axis is None and size[0] > size[1])

    def upright(values: Tensor, _: tuple[int, ...]) -> list[Tensor]:
        return [(values.transpose(0, 1) if turned else values).flip(0)]

    return Slices("time to the right, frequency upwards", upright)
