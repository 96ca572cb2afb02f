"""Atomic writing of files."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitx.errors import VitxError

# Pillow's options for each format.
PICTURES: Mapping[str, Mapping[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 1},
    ".webp": {"format": "WEBP", "quality": 90, "method": 0},
    ".jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
}


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a temporary file next to the path, and rename it. A rerun overwrites one that was left over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def savez(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as .npz."""
    save: Callable[..., None] = np.savez_compressed  # its types take an array for `allow_pickle`
    save(file, **arrays)


def encode(file: BinaryIO, picture: NDArray[np.uint8], suffix: str = ".png") -> None:
    """Write a picture, (height, width, 3) uint8, in the format of a suffix from `PICTURES`."""
    Image.fromarray(picture).save(file, **PICTURES[suffix])


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture, (height, width, 3) uint8, as .png, or raise a VitxError."""
    write_or_say(path, lambda file: encode(file, picture))


def write_or_say(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically, or raise a VitxError if it cannot be written."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise VitxError(f"{path} could not be written: {error.strerror or error}") from error


def png_path(given: str | Path) -> Path:
    """Return the path, or raise a VitxError unless it ends in .png."""
    path = Path(given)
    if path.suffix.lower() != ".png":
        raise VitxError(f"pictures are written as .png, found {given}")
    return path
