"""Clips: read from files, frame by frame, and prepared for a model that takes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torch import Tensor

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.reading import (
    ARRAYS,
    MOST_PIXELS,
    check_size,
    has_suffix,
    load_array,
    needs,
    opened,
    readable,
)

CLIPS = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
FRAMES_FIRST, CHANNELS_FIRST = 1, 2  # the dimension of time in a batch: (B, T, C, H, W) or (B, C, T, H, W)


@dataclass(frozen=True)
class ClipPreprocessing(Preprocessing):
    """The preprocessing of clips: each frame as an image, in their order."""

    frames: int = 0  # their number
    time_axis: int = CHANNELS_FIRST  # the dimension of time in a batch

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of a clip."""
        dims = [len(self.mean), *self.size]
        dims.insert(self.time_axis - 1, self.frames)
        return tuple(dims)

    @property
    def channels(self) -> int:
        """Return the dimension of the channels in a batch."""
        return 3 - self.time_axis

    @property
    def suffixes(self) -> frozenset[str]:
        """Return those of the files that it can read."""
        return CLIPS | ARRAYS

    def read(self, path: Path, most_pixels: int | None = None) -> NDArray[np.uint8]:
        """Read as many frames as the model takes, see `read_clip`."""
        return read_clip(path, self.frames, most_pixels or MOST_PIXELS)

    def __call__(self, clip: Any) -> Tensor:
        """Return a clip, (T, H, W, 3) uint8, as the model takes it, of `shape`."""
        frames = [super(ClipPreprocessing, self).__call__(Image.fromarray(frame)) for frame in clip]
        return torch.stack(frames, self.time_axis - 1)


def evenly(count: int, most: int) -> list[int]:
    """Choose evenly spaced places, the first and the last among them; the first if there is but one.

    Example:
        >>> evenly(4, 8), evenly(16, 4)
        ([0, 1, 2, 3], [0, 5, 10, 15])
    """
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def read_clip(path: Path, frames: int, most_pixels: int = MOST_PIXELS) -> NDArray[np.uint8]:
    """Read some frames of a clip, evenly spaced, (frames, H, W, 3).

    It is a film (av is needed), an animated GIF, or an array .npy, (T, H, W, 3) uint8. A clip with larger
    frames is refused before they are unpacked.
    """
    with readable(path, " as a clip"):
        count = sum(1 for _ in _frames(path, most_pixels))  # what a file says of it may be wrong, or missing
        if count < frames:
            raise VitxError(f"{path} has {count} frames, and the model takes {frames}")
        places = set(evenly(count, frames))
        shown = enumerate(_frames(path, most_pixels))
        return np.stack([np.asarray(unpacked()) for place, unpacked in shown if place in places])


def _frames(path: Path, most_pixels: int) -> Iterator[Callable[[], Any]]:
    """Yield for each frame a function that unpacks it, (H, W, 3)."""
    if has_suffix(path, ARRAYS):
        array = load_array(path)
        if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
            found = f"{array.dtype} of shape {array.shape}"
            raise VitxError(f"{path} holds {found}: a clip is uint8 (frames, height, width, 3)")
        check_size(path, (array.shape[2], array.shape[1]), most_pixels)
        yield from (partial(np.asarray, frame) for frame in array)
    elif has_suffix(path, (".gif",)):
        with opened(path) as film:
            check_size(path, film.size, most_pixels)
            yield from (partial(frame.convert, "RGB") for frame in ImageSequence.Iterator(film))
    else:
        with needs("av", path).open(str(path)) as film:
            context = film.streams.video[0].codec_context
            check_size(path, (context.width, context.height), most_pixels)
            yield from (partial(frame.to_ndarray, format="rgb24") for frame in film.decode(video=0))
