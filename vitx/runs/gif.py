"""Animated GIFs of drawings with photographs in them: few colours, well chosen, and small files."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.files import write_or_say
from vitx.pictures.render import LINE
from vitx.runs.run import Picture

_LENGTH, _SHORTEST, _LONGEST, _HELD = 8000, 80, 700, 2500  # of a film and of its frames, in milliseconds
_PAPER, _SAME = 254, 255  # the colours after those that are chosen: white, and what stays as it was
_SAMPLED = 200_000  # pixels that the colours are chosen by
_LEGEND = 4  # lines at the bottom, with two of a note
_ALIKE = 4  # of 256, by which colours may differ that are counted as one
_NOISE = 8  # of 256
_ORDER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]])  # Bayer's


def write_gif(path: Path, frames: Sequence[Picture]) -> None:
    """Writes a film that plays for ever, and holds its last frame.

    Args:
        path: of the file.
        frames: (height, width, 3) uint8, all of one width, with a legend at the bottom.
    """
    tallest = max(map(len, frames))  # captions may take several lines
    frames = [np.pad(one, ((0, tallest - len(one)), (0, 0), (0, 0)), constant_values=255) for one in frames]
    # One table of colours for all: with a table for each frame, what stands still would flicker.
    table = _table(frames)
    indices = [_indices(frame, table) for frame in frames]
    shown = [indices[0], *(np.where(now == before, _SAME, now) for before, now in pairwise(indices))]
    first, *others = [_with_table(places, table) for places in shown]
    each = min(max(_LENGTH // len(frames), _SHORTEST), _LONGEST)
    options = {
        "save_all": True,
        "append_images": others,
        "duration": [each] * (len(frames) - 1) + [_HELD],
        "loop": 0,
        "transparency": _SAME,
        "disposal": 1,  # a frame lies on the one before
        "optimize": False,  # which would renumber the colours
    }
    write_or_say(path, lambda file: first.save(file, "GIF", **options))


def _table(frames: Sequence[Picture]) -> Image.Image:
    """Chooses the colours: rare ones, as of what glows, and those of the legend get more than their share."""
    pixels = _without_paper(np.concatenate([frame.reshape(-1, 3) for frame in frames]))
    pixels = pixels[:: max(len(pixels) // _SAMPLED, 1)]
    codes = (pixels // _ALIKE).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    colours, counts = np.unique(codes, return_counts=True)
    shades = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], 1) * _ALIKE + _ALIKE // 2
    strip = np.repeat(shades.astype(np.uint8), np.ceil(np.sqrt(counts)).astype(int), axis=0)
    legend = _without_paper(frames[0][-_LEGEND * LINE :].reshape(-1, 3))
    strip = np.concatenate([strip, np.resize(legend, (len(strip) // 8, 3))])
    return Image.fromarray(strip[None]).quantize(
        _PAPER, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE
    )


def _without_paper(pixels: Picture) -> Picture:
    return pixels[(pixels < 255).any(-1)]


def _indices(frame: Picture, table: Image.Image) -> NDArray[np.uint8]:
    """Finds the colour of each pixel, (height, width).

    A fixed pattern is added before, so that colours fade without steps, and what stands still does so.
    """
    height, width = frame.shape[:2]
    pattern = np.tile((_ORDER + 0.5) / 16 - 0.5, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    noisy = np.clip(frame + pattern * _NOISE, 0, 255).astype(np.uint8)
    found = Image.fromarray(noisy).quantize(palette=table, dither=Image.Dither.NONE)
    return np.where((frame == 255).all(-1), _PAPER, np.asarray(found)).astype(np.uint8)


def _with_table(indices: NDArray[np.uint8], table: Image.Image) -> Image.Image:
    picture = Image.fromarray(indices.astype(np.uint8)).convert("P")
    colours = np.resize(np.array(table.getpalette(), np.uint8), (256, 3))
    colours[_PAPER] = 255
    picture.putpalette(colours.tobytes())
    return picture
