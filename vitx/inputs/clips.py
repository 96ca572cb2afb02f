"""Clips and volumes, read from files and prepared for a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.reading import ARRAYS, check_size, has_suffix, needs, opened, readable

CLIPS = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))
VOLUMES = frozenset((".nii", ".nii.gz"))


@dataclass(frozen=True)
class ClipPreprocessing(Preprocessing):
    """The preprocessing of clips: each frame is prepared like an image."""

    suffixes: ClassVar[frozenset[str]] = CLIPS | ARRAYS
    frames: int = 0  # the number of frames that the model takes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a prepared clip: (C, T, H, W), or (T, C, H, W) if `channels` is 2."""
        first = [len(self.mean), self.frames]
        return (*(first if self.channels == 1 else first[::-1]), *self.size)

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Read as many frames as the model takes, evenly spaced, (frames, H, W, 3)."""
        with readable(path, " as a clip"):
            # The number of frames in a header may be wrong or missing.
            count = sum(1 for _ in _frames(path, self.most_pixels))
            if count < self.frames:
                raise VitxError(f"{path} has {count} frames, and the model takes {self.frames}")
            places, shown = set(evenly(count, self.frames)), enumerate(_frames(path, self.most_pixels))
            return np.stack([np.asarray(unpacked()) for place, unpacked in shown if place in places])

    def __call__(self, clip: Any) -> Tensor:
        """Return a clip, (T, H, W, 3) uint8, prepared for the model, of `shape`."""
        if self.process is not None:
            return self.process(clip)
        frames = [super(ClipPreprocessing, self).__call__(Image.fromarray(frame)) for frame in clip]
        return torch.stack(frames, 2 - self.channels)


@dataclass(frozen=True)
class VolumePreprocessing(Preprocessing):
    """The preprocessing of volumes with one channel: they are resampled and normalized."""

    suffixes: ClassVar[frozenset[str]] = VOLUMES | ARRAYS
    most_pixels: int = 1_000_000_000  # ten times the limit of pictures, as scans are large
    depth: int = 0  # the first of the three spatial sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a prepared volume, (1, D, H, W)."""
        return (1, self.depth, *self.size)

    def read(self, path: Path) -> NDArray[np.float32]:
        """Read a volume, (D, H, W), in the units of the file."""
        with readable(path, " as a volume"):
            array = has_suffix(path, ARRAYS)
            loaded = np.load(path, mmap_mode="r") if array else needs("nibabel", path).load(path)
            shape = tuple(map(int, loaded.shape))
            if len(shape) != 3 or 0 in shape:
                raise VitxError(f"{path} holds an array of shape {shape}: a volume has three dimensions")
            check_size(path, shape, self.most_pixels)
            values = np.array(loaded) if array else loaded.get_fdata(dtype=np.float32)
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            said = f"{path} holds {values.dtype}, or NaN or infinite values"
            raise VitxError(f"{said}: a volume has finite numbers")
        return values.astype(np.float32)

    def __call__(self, volume: Any) -> Tensor:
        """Return a volume, (D, H, W), prepared for the model, (1, D, H, W)."""
        values = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
        resampled = F.interpolate(values, self.shape[1:], mode="trilinear", align_corners=False)[0]
        return (resampled - self.mean[0]) / self.std[0]


def evenly(count: int, most: int) -> list[int]:
    """Return up to `most` evenly spaced indices, including the first and the last; a single one is 0."""
    return [round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()]


def _frames(path: Path, most_pixels: int) -> Iterator[Callable[[], Any]]:
    """Yield, for each frame, a function that decodes it to (H, W, 3)."""
    if has_suffix(path, ARRAYS):
        array = np.load(path, mmap_mode="r")
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
