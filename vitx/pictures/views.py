"""Clips, volumes and spectrograms as flat pictures: a few slices side by side, their maps below."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs.clips import evenly

View = Literal["frames", "planes"]
MOST_FRAMES = 8
_NARROWEST, _WIDEST = 448, 1344  # pixels of a strip
_GAP, _PAPER = 2, 255  # pixels between slices, and their colour


class Slices(NamedTuple):
    """What of something is shown.

    Attributes:
        said: what it is, in a few words.
        cut: takes it from pixels, (..., 3), of one clip, volume or spectrogram, whose brightest place is
            given; (h, w, 3) each.
    """

    said: str
    cut: Callable[[Tensor, tuple[int, ...]], Sequence[Tensor]]


def slices_of(
    size: tuple[int, ...],
    channels: int,
    view: View | None = None,
    time_axis: int | None = None,
    most_frames: int = MOST_FRAMES,
) -> Slices:
    """Chooses what is shown.

    Args:
        size: (T, H, W) of a clip, (D, H, W) of a volume, (F, T) of a spectrogram.
        channels: how many there are.
        view: "frames", evenly spaced, or "planes", the three through the brightest place; by default frames
            where there are three channels, as of colours.
        time_axis: of a spectrogram (B, F, T) or (B, T, F), the dimension of time; by default the longer one.
        most_frames: how many are shown.

    Raises:
        VitxError: There is no such view or axis.
    """
    if len(size) == 2:
        return _spectrogram(size, time_axis)
    if view not in ("frames", "planes", None):
        raise VitxError(f"view must be 'frames' or 'planes', found {view!r}")
    if view == "planes" or (view is None and channels != 3):
        return Slices("the planes through the brightest place", _planes)
    shown = evenly(size[0], most_frames)
    numbers = ", ".join(str(number + 1) for number in shown)
    said = f"frames {numbers}" + (f" of {size[0]}" if len(shown) < size[0] else "")
    return Slices(said, lambda clip, _: [clip[number] for number in shown])


def strips(shown: Sequence[Tensor], heat: Tensor, slices: Slices) -> Tensor:
    """Sets the slices of each one side by side, one strip below the other.

    Args:
        shown: what of each one is a strip, as the input and what was drawn over it; (B, ..., 3) uint8 each.
        heat: (B, ...), the map that tells the brightest place.
        slices: what of it is shown.

    Returns:
        (B, height, width, 3) uint8.
    """
    rows = []
    for number, found in enumerate(heat.cpu()):
        peak = tuple(int(place) for place in torch.unravel_index(found.argmax(), found.shape))
        rows.append(torch.cat([_beside(slices.cut(part[number], peak)) for part in shown]))
    return torch.stack(rows)


def strip_width(found: Tensor) -> int:
    """How wide strips, (B, height, width, 3), are drawn: readable, and no wider than a screen."""
    return min(max(found.shape[2], _NARROWEST), _WIDEST)


def _planes(volume: Tensor, peak: tuple[int, ...]) -> list[Tensor]:
    return [volume.select(dim, place) for dim, place in enumerate(peak)]


def _spectrogram(size: tuple[int, ...], time_axis: int | None) -> Slices:
    if time_axis not in (None, 1, 2):
        raise VitxError(f"time_axis must be 1 or 2, a dimension of a spectrogram, found {time_axis!r}")
    turned = time_axis == 1 or (time_axis is None and size[0] > size[1])

    def upright(values: Tensor, _: tuple[int, ...]) -> list[Tensor]:
        return [(values.transpose(0, 1) if turned else values).flip(0)]

    return Slices("time to the right, frequency upwards", upright)


def _beside(pictures: Sequence[Tensor]) -> Tensor:
    """Sets pictures, (h, w, 3), side by side, with a gap around each, on paper."""
    height = max(len(picture) for picture in pictures) + _GAP
    columns = []
    for picture in pictures:
        paper = picture.new_full((height, picture.shape[1] + _GAP, 3), _PAPER)
        paper[: len(picture), : picture.shape[1]] = picture
        columns.append(paper)
    return torch.cat(columns, 1)
