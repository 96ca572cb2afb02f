"""Clips, volumes and spectrograms as flat pictures: a few slices side by side, their maps below."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs.clips import evenly
from vitx.pictures.marks import say_uniform
from vitx.pictures.render import heatmaps, scaled_up

View = Literal["frames", "planes"]
MOST_FRAMES = 8
_PICTURE = 224  # pixels
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
    channels: int | None,
    view: View | None = None,
    time_axis: int | None = None,
    most_frames: int = MOST_FRAMES,
) -> Slices | None:
    """Chooses what is shown; None: a picture, which is shown whole.

    Args:
        size: (H, W) of a picture, (T, H, W) of a clip, (D, H, W) of a volume, (F, T) of a spectrogram.
        channels: how many there are; None: it is a spectrogram.
        view: "frames", evenly spaced, or "planes", the three through the brightest place; by default frames
            where there are three channels, as of colours.
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
        return Slices("the planes through the brightest place", _planes)
    shown = evenly(size[0], most_frames)
    numbers = ", ".join(str(number + 1) for number in shown)
    said = f"frames {numbers}" + (f" of {size[0]}" if len(shown) < size[0] else "")
    return Slices(said, lambda clip, _: [clip[number] for number in shown])


def laid_out(
    pixels: Tensor,
    drawn: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    slices: Slices | None,
    signed: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Lays out the input and what was drawn over it: columns, or strips one below the other as one column.

    What was drawn of maps that are nearly uniform says so, or that all speaks against.

    Args:
        pixels: (B, ..., 3) uint8, on the CPU.
        drawn: title -> pixels with a map over them, of the same shape.
        maps: title -> the map, (B, ...), >= 0; the brightest place of the first one is looked for.
        slices: what is shown; None: all.
        signed: title -> the map with signs, where it has any.

    Returns:
        Title -> (B, height, width, 3) uint8.
    """
    signs = {title: (signed or {}).get(title) for title in drawn}
    if slices is None:
        said = {title: say_uniform(one, maps[title], signs[title]) for title, one in drawn.items()}
        return {"input": pixels} | said
    heat = heatmaps(next(iter(maps.values())), tuple(pixels.shape[1:-1]))
    rows = [strips(pixels, heat, slices)]
    rows += [
        say_uniform(strips(one, heat, slices), maps[title], signs[title]) for title, one in drawn.items()
    ]
    widest = max(row.shape[2] for row in rows)
    strip = torch.cat([scaled_up(row, widest) for row in rows], 1)
    return {f"{', '.join(('input', *drawn))}: {slices.said}": strip}


def strips(pictures: Tensor, heat: Tensor, slices: Slices) -> Tensor:
    """Sets the slices of each one side by side.

    Args:
        pictures: (B, ..., 3) uint8.
        heat: (B, ...), the map that tells the brightest place.
        slices: what of it is shown.

    Returns:
        (B, height, width, 3) uint8.
    """
    rows = []
    for picture, found in zip(pictures, heat.cpu(), strict=True):
        peak = tuple(int(place) for place in torch.unravel_index(found.argmax(), found.shape))
        rows.append(_beside(slices.cut(picture, peak)))
    return torch.stack(rows)


def tile_width(columns: Mapping[str, Tensor], slices: Slices | None) -> int:
    """How wide columns are drawn: a strip is readable, and no wider than a screen."""
    if slices is None:
        return _PICTURE
    return min(max(next(iter(columns.values())).shape[2], _NARROWEST), _WIDEST)


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
