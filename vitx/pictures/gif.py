"""Animated GIFs of drawings with photographs in them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vitx.files import write_or_say
from vitx.pictures.render import Picture

_LENGTH, _SHORTEST, _LONGEST, _HELD = 8000, 80, 700, 2500  # of a film and of its frames, in milliseconds
_PAPER = 255  # the last colour: white, which Pillow would only come near to
_SAMPLED = 200_000  # pixels that the other colours are chosen by


def write_gif(path: Path, frames: Sequence[Picture]) -> None:
    """Write a film that plays for ever, and holds its last frame."""
    tallest = max(map(len, frames))  # captions may take several lines
    frames = [np.pad(one, ((0, tallest - len(one)), (0, 0), (0, 0)), constant_values=255) for one in frames]
    pixels = np.concatenate([frame[(frame < 255).any(-1)] for frame in frames])
    sample = pixels[:: len(pixels) // _SAMPLED + 1]
    # One table of colours for all: with a table for each frame, what stands still would flicker.
    table = Image.fromarray(sample[None]).quantize(_PAPER, Image.Quantize.MEDIANCUT, kmeans=2)
    colors = np.resize(np.array(table.getpalette(), np.uint8), (256, 3))
    colors[_PAPER] = 255
    pictures = []
    for frame in frames:  # without dither, whose noise would move
        found = np.array(Image.fromarray(frame).quantize(palette=table, dither=Image.Dither.NONE))
        found[(frame == 255).all(-1)] = _PAPER
        pictures.append(Image.fromarray(found).convert("P"))
        pictures[-1].putpalette(colors.tobytes())
    first, *others = pictures
    durations = [min(max(_LENGTH // len(frames), _SHORTEST), _LONGEST)] * len(others) + [_HELD]
    options = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    write_or_say(path, lambda file: first.save(file, "GIF", **options))
