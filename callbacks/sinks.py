"""Where pictures, scalars and maps go."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_scalars(loggers: Iterable[Any], scalars: Mapping[str, float], step: int) -> None:
    """Logs scalars to every logger."""
    for logger in loggers:
        logger.log_metrics(dict(scalars), step=step)


def write_picture(
    loggers: Iterable[Any], folder: Path, tag: str, picture: NDArray[np.uint8], step: int
) -> None:
    """Shows a picture in every logger that can hold one; with none, writes a PNG file.

    Args:
        loggers: the trainer's. What a logger can hold is found by what its `experiment` can do, as
            `lightning` and `pytorch_lightning` have classes of their own.
        folder: where the PNG file goes.
        tag: name of the picture; the part before the first slash is its group.
        picture: (height, width, 3) uint8.
        step: the training step that it belongs to.
    """
    writers = [logger.experiment for logger in loggers if _holds_pictures(logger)]
    for writer in writers:
        writer.add_image(tag, picture, step, dataformats="HWC")
        writer.flush()
    if not writers:
        path = folder / f"{tag.replace('/', '-')}-{step:06d}.png"
        _write_atomically(path, lambda file: Image.fromarray(picture).save(file, "PNG"))


def write_maps(folder: Path, maps: Mapping[str, NDArray[np.float32]], step: int) -> None:
    """Writes the raw maps of each method, (n, h, w), to one .npz file."""
    _write_atomically(
        folder / f"maps-{step:06d}.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **maps)
    )


def _holds_pictures(logger: Any) -> bool:
    return callable(getattr(logger.experiment, "add_image", None))


def _write_atomically(path: Path, write: Any) -> None:
    """Writes beside the path and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            write(file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
