"""Images of any number of channels, from .npy and .tif files."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.errors import VitxError
from vitx.inputs.reading import ARRAYS, MOST_PIXELS, check_size, needs, read_picture, readable

_TIFF = frozenset((".tif", ".tiff"))
_WHOLE = {"uint8": 255, "uint16": 65535}


def read_image(
    path: Path, channels: int, most_pixels: int = MOST_PIXELS
) -> Image.Image | NDArray[np.float32]:
    """Read a file for a model of so many channels: as a picture, or as channels (C, H, W); see below."""
    if path.suffix.lower() in ARRAYS or channels not in (1, 3):
        return read_bands(path, channels, most_pixels)
    return read_picture(path, most_pixels)


def read_bands(path: Path, channels: int, most_pixels: int = MOST_PIXELS) -> NDArray[np.float32]:
    """Read an image of so many channels, (channels, H, W), from .npy or .tif.

    The channels are the first or the last dimension of the file. Whole numbers of 8 or 16 bits are scaled to
    [0, 1]. A larger image is refused before it is read.

    Raises:
        VitxError: It cannot be read, has another number of channels, or numbers whose range is unknown.
    """
    with readable(path):
        found, values = _opened(path)
        first = _channels_first(path, found, channels)
        height, width = found[1:] if first else found[:2]
        check_size(path, (width, height), most_pixels)
        read = np.asarray(values())
    scaled = _scaled(path, read.reshape(found))
    return np.ascontiguousarray(scaled if first else scaled.transpose(2, 0, 1))


def _opened(path: Path) -> tuple[tuple[int, ...], Any]:
    """Return the shape, (C, H, W) or (H, W, C), and a function that reads the values."""
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, read = array.shape, lambda: array
    elif suffix in _TIFF:
        tifffile = needs("tifffile", path)
        logging.getLogger("tifffile").disabled = True  # what is wrong is said here
        with tifffile.TiffFile(path) as file:
            shape, read = file.series[0].shape, lambda: tifffile.imread(path)
    else:
        raise VitxError(f"{path} has three channels at most, not those of the model: give .npy or .tif")
    return (*shape, 1) if len(shape) == 2 else tuple(shape), read


def _channels_first(path: Path, shape: tuple[int, ...], channels: int) -> bool:
    if len(shape) == 3 and (shape[0] == channels) != (shape[2] == channels):
        return shape[0] == channels
    raise VitxError(
        f"{path} is {' x '.join(map(str, shape))}: the model takes {channels} channels, as the first or "
        "the last of three dimensions"
    )


def _scaled(path: Path, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.name in _WHOLE:
        scaled: NDArray[np.float32] = values.astype(np.float32) / np.float32(_WHOLE[values.dtype.name])
        return scaled
    if not np.issubdtype(values.dtype, np.floating):
        raise VitxError(
            f"{path} holds {values.dtype} numbers, whose range is unknown: save uint8 or uint16, "
            "which are scaled to [0, 1], or floating point numbers in the units of mean and std"
        )
    if not np.isfinite(values).all():
        raise VitxError(f"{path} holds NaN or infinite values: fill them in")
    return values.astype(np.float32)
