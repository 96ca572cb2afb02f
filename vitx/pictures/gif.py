"""Animated GIFs of drawings that contain photographs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitx.files import write_or_say
from vitx.pictures.render import Picture

_LENGTH, _SHORTEST, _LONGEST, _HELD = 8000, 80, 700, 2500  # milliseconds: the film, any frame, the last frame
_PAPER = 255  # index of the last color: white, which Pillow would only approximate
_SAMPLED = 25_000  # number of pixels from which the other colors are chosen: more take long and gain little


def write_gif(path: Path, frames: Sequence[Picture]) -> None:
    """Write a film that loops forever, and holds its last frame."""
    tallest = max(map(len, frames))  # captions may take several lines
    frames = [np.pad(one, ((0, tallest - len(one)), (0, 0), (0, 0)), constant_values=255) for one in frames]
    pixels = np.concatenate([frame[(frame < 255).any(-1)] for frame in frames])
    sample = pixels[:: len(pixels) // _SAMPLED + 1]
    # All frames share one color table: with a table for each frame, static parts would flicker.
    table = Image.fromarray(sample[None]).quantize(_PAPER, Image.Quantize.MEDIANCUT, kmeans=2)
    colors = np.resize(np.array(table.getpalette(), np.uint8), (256, 3))
    colors[_PAPER] = 255
    pictures = []
    for frame in frames:  # without dithering, whose noise would move
        found = np.array(Image.fromarray(frame).quantize(palette=table, dither=Image.Dither.NONE))
        found[(frame == 255).all(-1)] = _PAPER
        pictures.append(Image.fromarray(found).convert("P"))
        pictures[-1].putpalette(colors.tobytes())
    first, *others = pictures
    durations = [min(max(_LENGTH // len(frames), _SHORTEST), _LONGEST)] * len(others) + [_HELD]
    options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    write_or_say(path, lambda file: first.save(file, "GIF", **options))
