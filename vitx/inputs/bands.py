"""Images of any number of channels, from .npy and .tif files."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.errors import VitxError
from vitx.inputs.reading import (
    ARRAYS,
    MOST_PIXELS,
    check_size,
    has_suffix,
    load_array,
    needs,
    read_picture,
    readable,
)

_WHOLE = {"uint8": 255, "uint16": 65535}


def read_image(
    path: Path, channels: int, most_pixels: int = MOST_PIXELS
) -> Image.Image | NDArray[np.float32]:
    """Read a file for a model of so many channels: a picture, or an array of channels, (C, H, W).

    An array is of .npy or .tif, with the channels in the first or the last dimension. Whole numbers of 8 or
    16 bits are scaled to [0, 1]. What is larger is refused before it is read.
    """
    if channels in (1, 3) and not has_suffix(path, ARRAYS):
        return read_picture(path, most_pixels)
    with readable(path):
        shape, read = _opened(path)
        if len(shape) != 3 or (shape[0] == channels) == (shape[2] == channels):
            raise VitxError(
                f"{path} is {' x '.join(map(str, shape))}: the model takes {channels} channels, as the first "
                "or the last of three dimensions"
            )
        first = shape[0] == channels
        height, width = shape[1:] if first else shape[:2]
        check_size(path, (width, height), most_pixels)
        values = np.asarray(read()).reshape(shape)
    if values.dtype.name in _WHOLE:
        values = values.astype(np.float32) / np.float32(_WHOLE[values.dtype.name])
    elif not np.issubdtype(values.dtype, np.floating):
        raise VitxError(
            f"{path} holds {values.dtype} numbers, whose range is unknown: save uint8 or uint16, "
            "which are scaled to [0, 1], or floating point numbers in the units of mean and std"
        )
    if not np.isfinite(values).all():
        raise VitxError(f"{path} holds NaN or infinite values: fill them in")
    return np.ascontiguousarray(values if first else values.transpose(2, 0, 1), np.float32)


def _opened(path: Path) -> tuple[tuple[int, ...], Callable[[], Any]]:
    """Return the shape, (C, H, W) or (H, W, C), and a function that reads the values."""
    if has_suffix(path, ARRAYS):
        array = load_array(path)
        shape, read = array.shape, lambda: array
    elif has_suffix(path, (".tif", ".tiff")):
        tifffile = needs("tifffile", path)
        logging.getLogger("tifffile").disabled = True  # what is wrong is said here
        with tifffile.TiffFile(path) as file:
            shape, read = file.series[0].shape, lambda: tifffile.imread(path)
    else:
        raise VitxError(f"{path} has three channels at most, not those of the model: give .npy or .tif")
    return (*shape, 1) if len(shape) == 2 else tuple(shape), read
