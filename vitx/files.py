"""Files that are written whole or not at all."""

import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vitx.errors import VitxError

# How each kind of picture is written, by Pillow; PNG is written here.
PICTURES: Mapping[str, Mapping[str, Any]] = {
    ".png": {},
    ".webp": {"format": "WEBP", "quality": 90, "method": 0},
    ".jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
}


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes beside the path and renames, so that a reader never sees half a file.

    What a killed run left half written has a name that the resumed run writes again.

    Args:
        path: of the file; its folder is made if there is none.
        write: is given the open file.
    """
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
    """Writes arrays as .npz, one entry for each and nothing else.

    An older NumPy takes `allow_pickle` for one more array, so it is left out: numbers need no pickle.
    """
    save: Callable[..., None] = np.savez_compressed
    save(file, **arrays)


def encode(file: BinaryIO, picture: NDArray[np.uint8], suffix: str = ".png") -> None:
    """Writes a picture, (height, width, 3) uint8, in the format of a suffix, one of `PICTURES`."""
    if suffix == ".png":
        file.write(_png(picture))
        return
    from PIL import Image

    Image.fromarray(picture).save(file, **PICTURES[suffix])


def _png(picture: NDArray[np.uint8]) -> bytes:
    """Encodes a picture with little effort: each row less the one above it, and run lengths.

    Libraries choose a filter for each row, which alone takes longer than all of this; files grow by a tenth.
    """
    height, width, _ = picture.shape
    rows = picture.reshape(height, 3 * width)
    filtered = np.full((height, 1 + 3 * width), 2, np.uint8)  # the number of that filter begins each row
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),  # 8 bits, RGB, not interlaced
        b"IDAT": deflate.compress(filtered.tobytes()) + deflate.flush(),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    """Writes a picture, (height, width, 3) uint8.

    Raises:
        VitxError: The file cannot be written.
    """
    write_or_say(path, lambda file: encode(file, picture))


def write_or_say(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """As `write_atomically`, but raises a VitxError if the file cannot be written."""
    try:
        write_atomically(path, write)
    except OSError as error:
        raise VitxError(f"{path} could not be written: {error.strerror or error}") from error


def png_path(given: str | Path) -> Path:
    """Returns a path that ends with .png, or raises a VitxError."""
    path = Path(given)
    if path.suffix.lower() != ".png":
        raise VitxError(f"pictures are written as .png, found {given}")
    return path
