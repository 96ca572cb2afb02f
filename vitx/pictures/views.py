"""Maps over images, or over slices of clips and volumes, with boxes, rings around sinks, and words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.evaluation.metrics import entropy
from vitx.inputs.clips import evenly
from vitx.pictures.render import INK, PAPER, TILE_WIDTH, font, heatmaps, overlays, scaled_up, signed_overlays

View = Literal["frames", "planes"] | None
Size = tuple[int, ...]
Marks = Tensor | None  # boxes or sinks of images, if there are any
_PICTURE = 224  # pixels: in narrower pictures, lines are coarse and words small
_GAP, _PAPER = 2, 255  # pixels between slices, and their color
UNIFORM = 0.99  # relative entropy above which a map is nearly uniform
BOX = "#00b3a4"  # color of the outline of a target's box
SINKS = "rings: patches that most others attend to (possible sinks)"
_LETTERS = 13 / TILE_WIDTH  # height of letters: share of the picture


class Slices(NamedTuple):
    """The parts of a clip, volume or spectrogram to show."""

    said: str  # a short description for a title
    cut: Callable[[Tensor, Size], Sequence[Tensor]]  # takes pixels and their brightest place


@dataclass(frozen=True)
class Layer:
    """Maps of some images, with the boxes and sinks to mark in them."""

    maps: Tensor  # (B, ...), >= 0
    signed: Tensor | None = None
    boxes: Marks = None  # (B, 4), in pixels of the images
    sinks: Marks = None  # (B, h, w) bool

    def at(self, places: list[int]) -> "Layer":
        """Return the layer of the images at these indices."""
        others = (one if one is None else one[places] for one in (self.signed, self.boxes, self.sinks))
        return Layer(self.maps[places], *others)

    def over(self, pixels: Tensor, colormap: str, signed: bool) -> Tensor:
        """Overlay the maps on images, (B, ..., 3) uint8."""
        if signed:
            return signed_overlays(pixels, self.maps if self.signed is None else self.signed)
        return overlays(pixels, heatmaps(self.maps, tuple(pixels.shape[1:-1])), colormap)

    def marked(self, drawn: Tensor, size: Size | None = None) -> Tensor:
        """Mark boxes and sinks in overlays of whole images of a size, and write on maps that mislead.

        Misleading maps are nearly uniform ones, which scaling turns into blotches, and those in which all
        patches speak against the score, which are bright where patches do so the least.
        """
        said = ["nearly uniform" if one else "" for one in (entropy(self.maps) > UNIFORM).tolist()]
        if self.signed is not None:
            against = all_against(self.signed).tolist()
            said = ["all against" if one else word for one, word in zip(against, said, strict=True)]
        if size is None:
            return painted(drawn, words=said)
        return painted(drawn, size, self.boxes, self.sinks, said)


def slices_of(
    size: Size, channels: int | None, view: View = None, time_axis: int | None = None, most_frames: int = 8
) -> Slices | None:
    """Choose the slices to show; return None for a picture, which is shown whole.

    The size is (H, W) of a picture, (T, H, W) of a clip, (D, H, W) of a volume, or (F, T) of a spectrogram,
    which has no `channels`. See `vitx.Explanation.picture` for `view` and `time_axis`.
    """
    if len(size) == 2 and channels is not None:
        return None
    if len(size) == 2:
        if time_axis not in (None, 1, 2):
            raise VitxError(f"time_axis must be 1 or 2, a dimension of a spectrogram, found {time_axis!r}")
        turned = time_axis == 1 or (time_axis is None and size[0] > size[1])
        said = "time to the right, frequency upwards"
        return Slices(said, lambda values, _: [(values.transpose(0, 1) if turned else values).flip(0)])
    if view not in ("frames", "planes", None):
        raise VitxError(f"view must be 'frames' or 'planes', found {view!r}")
    if view == "planes" or (view is None and channels != 3):
        said = "the planes through the brightest place"
        return Slices(said, lambda volume, peak: [volume.select(*place) for place in enumerate(peak)])
    shown = evenly(size[0], most_frames)
    said = f"frames {', '.join(str(number + 1) for number in shown)}"
    said += f" of {size[0]}" if len(shown) < size[0] else ""
    return Slices(said, lambda clip, _: [clip[number] for number in shown])


def laid_out(
    pixels: Tensor,
    layers: Mapping[str, Layer],
    slices: Slices | None = None,
    colormap: str = "inferno",
    signed: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """Overlay maps on images, (B, ..., 3) uint8; arrange the input and each overlay as columns, or as strips.

    Boxes and sinks are marked in pictures that are shown whole. Slices, if there are any, show the brightest
    place of the first maps. Return title -> (B, height, width, 3) uint8, and a note on the marks.
    """
    size, first = tuple(pixels.shape[1:-1]), next(iter(layers.values()))
    drawn = {title: layer.over(pixels, colormap, signed) for title, layer in layers.items()}
    if slices is None:
        shown = painted(pixels, size, first.boxes if len(layers) == 1 else None)
        marked = {title: layers[title].marked(one, size) for title, one in drawn.items()}
        ringed = any(layer.sinks is not None and layer.sinks.any() for layer in layers.values())
        return {"input": shown} | marked, SINKS if ringed else ""
    heat = heatmaps(first.maps, size)
    rows = [strips(pixels, heat, slices)]
    rows += [layers[title].marked(strips(one, heat, slices)) for title, one in drawn.items()]
    widest = max(row.shape[2] for row in rows)
    strip = torch.cat([scaled_up(row, widest) for row in rows], 1)
    return {f"{', '.join(('input', *drawn))}: {slices.said}": strip}, ""


def strips(pictures: Tensor, heat: Tensor, slices: Slices) -> Tensor:
    """Arrange slices of each picture, (B, ..., 3) uint8, side by side; `heat` gives the brightest place."""
    rows = []
    for picture, found in zip(pictures, heat.cpu(), strict=True):
        peak = tuple(int(place) for place in torch.unravel_index(found.argmax(), found.shape))
        parts = slices.cut(picture, peak)
        tallest = max(map(len, parts))
        gaps = ((0, 0, 0, _GAP, 0, tallest + _GAP - len(part)) for part in parts)
        rows.append(torch.cat([F.pad(*both, value=_PAPER) for both in zip(parts, gaps, strict=True)], 1))
    return torch.stack(rows)


def all_against(signed: Tensor) -> Tensor:
    """Return for which maps, (B, ...), some patches speak against the score and none for it, (B,)."""
    values = signed.flatten(1)
    return (values.amax(1) <= 0) & (values.amin(1) < 0)


def painted(
    pictures: Tensor, size: Size = (), boxes: Marks = None, sinks: Marks = None, words: Sequence[str] = ()
) -> Tensor:
    """Mark pictures, (B, H, W, 3) uint8, scaled up by an integer if lines would be coarse.

    Boxes, (B, 4), are x0, y0, x1, y1 in images of a size. Each sink, (B, h, w) bool, gets a ring. Words are
    written at the lower edge.
    """
    sinks = None if sinks is None or not sinks.any() else sinks
    if boxes is None and sinks is None and not any(words):
        return pictures
    canvases = [Image.fromarray(one) for one in scaled_up(pictures.cpu(), _PICTURE).numpy()]
    for place, canvas in enumerate(canvases):
        if boxes is not None:
            _outline(canvas, boxes[place].cpu().numpy(), size)
        if sinks is not None:
            _ring(canvas, sinks[place])
        if words and words[place]:
            _stamp(canvas, words[place])
    return torch.from_numpy(np.stack([np.array(canvas) for canvas in canvases]))


def _outline(canvas: Image.Image, box: NDArray[np.floating], size: Size) -> None:
    draw, edges = ImageDraw.Draw(canvas), np.array([*canvas.size] * 2)
    corners = np.clip(box * edges / np.array([*size[::-1]] * 2), 0, edges - 1)
    inside, line = corners + np.array([1, 1, -1, -1]), max(2, canvas.width // 112)
    draw.rectangle([*corners], outline=PAPER, width=line + 2)
    if (inside[:2] < inside[2:]).all():
        draw.rectangle([*inside], outline=BOX, width=line)


def _ring(canvas: Image.Image, marks: Tensor) -> None:
    draw = ImageDraw.Draw(canvas)
    high, wide = canvas.height / marks.shape[0], canvas.width / marks.shape[1]
    for row, column in marks.nonzero().tolist():
        left, top, right, bottom = column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1
        draw.ellipse((left, top, right, bottom), outline=PAPER, width=3)
        draw.ellipse((left + 1, top + 1, right - 1, bottom - 1), outline=BOX, width=1)


def _stamp(canvas: Image.Image, text: str) -> None:
    draw, height = ImageDraw.Draw(canvas), max(8, round(min(canvas.size) * _LETTERS))
    draw.rectangle((0, canvas.height - 1.4 * height, canvas.width, canvas.height), INK)
    below = (canvas.width / 2, canvas.height - 0.2 * height)
    draw.text(below, text, PAPER, font(height), anchor="md")
