"""Image files: found, opened, and converted to upright 8-bit RGB, or to an array of any channels."""

import glob
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vitx.errors import VitxError, failure

ARRAYS = frozenset((".npy",))
SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
MOST_PIXELS = 100_000_000
_FEWEST = 8  # pixels in height and width: smaller images show nothing
_opening = Lock()


def find_pictures(paths: Iterable[str | Path], more: frozenset[str] = frozenset()) -> list[Path]:
    """Find image files, and files with the suffixes in `more`, each once, sorted within a path.

    A path is a file, whatever its suffix; a folder, which is searched recursively for image files; or a
    pattern such as `pictures/*.jpg`.
    """
    found: dict[Path, Path] = {}
    for given in paths:
        path = Path(given)
        if not str(given):
            raise VitxError("a path is empty: name a file or folder")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if is_picture(file, more))
        elif path.exists():
            files = [path]
        elif glob.has_magic(str(given)):
            matches = glob.glob(str(given), recursive=True)  # noqa: PTH207 (Path.glob takes relative ones)
            files = sorted(file for file in map(Path, matches) if file.is_file())
        else:
            raise VitxError(f"there is no file or folder {given}")
        if not files:
            none = f"there are no image files in {given} ({', '.join(sorted(SUFFIXES | more))})"
            raise VitxError(none if path.is_dir() else f"nothing matches {given}")
        for file in files:
            found.setdefault(whole_path(file), file)
    return list(found.values())


def find_picture(path: str, more: frozenset[str] = frozenset()) -> Path:
    """Return the single image file at a path, or raise a VitxError."""
    file, *others = find_pictures([path], more)
    if others:
        raise VitxError(f"{path} means {1 + len(others)} pictures: name one")
    return file


def whole_path(path: Path) -> Path:
    """Return an absolute path without `..`; symbolic links are resolved only if it contains `..`."""
    return path.parent.resolve() / path.name if ".." in path.parts[:-1] else path.absolute()


def has_suffix(path: Path, suffixes: Iterable[str]) -> bool:
    """Return whether a file has one of these suffixes, such as `.nii.gz`, ignoring case."""
    return path.name.lower().endswith(tuple(suffixes))


def is_picture(path: Path, more: frozenset[str] = frozenset()) -> bool:
    """Return whether a file in a folder counts as a picture: by its suffix, and unless it is hidden."""
    return has_suffix(path, SUFFIXES | more) and path.is_file() and not path.name.startswith(".")


def read_picture(path: str | Path, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read an image file, or the first frame of an animation, as RGB; refuse one of too many pixels."""
    path = Path(path)
    with readable(path), opened(path) as image:
        check_size(path, image.size, most_pixels)
        image.load()
        return to_rgb(image, str(path))


def read_image(
    path: Path, channels: int, most_pixels: int = MOST_PIXELS
) -> Image.Image | NDArray[np.float32]:
    """Read a file for a model with this number of channels: a picture, or an array (C, H, W).

    An array comes from .npy or .tif, with the channels in the first or last dimension. Unsigned integers of 8
    or 16 bits are scaled to [0, 1]. Files with more than `most_pixels` are refused before they are read.
    """
    if channels in (1, 3) and not has_suffix(path, ARRAYS):
        return read_picture(path, most_pixels)
    with readable(path):
        shape, read = _open_channels(path)
        if len(shape) != 3 or (shape[0] == channels) == (shape[2] == channels):
            said = f"{path} is {' x '.join(map(str, shape))}: the model takes {channels} channels"
            raise VitxError(f"{said}, as the first or the last of three dimensions")
        first = shape[0] == channels
        height, width = shape[1:] if first else shape[:2]
        check_size(path, (width, height), most_pixels)
        values = np.asarray(read()).reshape(shape)
    if values.dtype.name in ("uint8", "uint16"):
        values = values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    elif not np.issubdtype(values.dtype, np.floating):
        raise VitxError(
            f"{path} holds {values.dtype} numbers, whose range is unknown: save uint8 or uint16, "
            "which are scaled to [0, 1], or floating point numbers in the units of mean and std"
        )
    if not np.isfinite(values).all():
        raise VitxError(f"{path} holds NaN or infinite values: replace them")
    return np.ascontiguousarray(values if first else values.transpose(2, 0, 1), np.float32)


def _open_channels(path: Path) -> tuple[tuple[int, ...], Callable[[], Any]]:
    """Return the shape, (C, H, W) or (H, W, C), and a function that reads the values."""
    if has_suffix(path, ARRAYS):
        array = np.load(path, mmap_mode="r")
        shape, read = array.shape, lambda: array
    elif has_suffix(path, (".tif", ".tiff")):
        tifffile = needs("tifffile", path)
        logging.getLogger("tifffile").disabled = True  # errors are reported here
        with tifffile.TiffFile(path) as file:
            shape, read = file.series[0].shape, lambda: tifffile.imread(path)
    else:
        raise VitxError(f"{path} has three channels at most, not those of the model: give .npy or .tif")
    return (*shape, 1) if len(shape) == 2 else tuple(shape), read


def opened(path: Path) -> Image.Image:
    """Open an image file of any size; call `check_size` next, as Pillow's limit is global."""
    with _opening:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None:  # not None, as other threads multiply it
            Image.MAX_IMAGE_PIXELS = sys.maxsize
        try:
            return Image.open(path)
        except UnidentifiedImageError as error:
            raise VitxError(f"{path} is not an image file that can be read") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def readable(path: Path, kind: str = "") -> Iterator[None]:
    """Raise a VitxError if a file is missing or the block cannot read it (`kind`, such as " as a clip")."""
    if not path.is_file():
        raise VitxError(f"there is no file {path}" if not path.exists() else f"{path} is no file")
    said = f"{path} could not be read{kind}, it may be damaged"
    with failure(said, lambda error: str(error).strip().split("\n")[0]):
        yield


def needs(package: str, path: Path) -> Any:
    """Import a package that reads a file, or raise a VitxError that says how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise VitxError(f"{path} needs {package} to be read: pip install {package}") from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Turn an image upright by its EXIF data, and convert it to 8-bit RGB, with white for transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        said = f"{name} has floating point numbers, whose range is unknown"
        raise VitxError(f"{said}: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, np.float32) * (255 / 65535)  # from 16 bits
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")


def check_size(path: Path, size: tuple[int, ...], most_pixels: int) -> None:
    """Raise a VitxError if an image (width, height) or volume has too many pixels or too few."""
    said = f"{path} has {' x '.join(map(str, size))} {'pixels' if len(size) == 2 else 'voxels'}"
    if prod(size) > most_pixels:
        said += f", more than the {most_pixels:,} that are allowed: make it smaller"
        raise VitxError(f"{said}, or let `vitx explain` take more with --input-options max_pixels=N")
    if len(size) == 2 and min(size) < _FEWEST:
        raise VitxError(f"{said}: at least {_FEWEST} x {_FEWEST} are needed")
