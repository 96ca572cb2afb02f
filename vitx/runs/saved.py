"""Read the folder of a run, as `vitx.runs.folder` writes it."""

import csv
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitx.errors import VitxError
from vitx.inputs.clips import evenly
from vitx.runs import FACTS, FIRING, FOLDER, IMAGES, LOGITS, NUMBERS, SINKS
from vitx.runs.folder import files_of, read_facts, read_rows
from vitx.runs.run import Run

FRAMES_IN_A_CARD = 4  # of a clip, in a picture as wide as TensorBoard shows it, and in a report


def run_of(folder: Path) -> Path:
    """Return the folder of a run, given its folder `vitx`, which may have another name if it was copied."""
    return folder.parent if folder.name == FOLDER else folder


def read_run(folder: Path, path: Path) -> Run:
    """Read the folder `vitx` of a run, which the user calls `path`.

    Raise a VitxError if it is damaged, mixes several runs or holds no maps.
    """
    facts = read_facts(folder)
    if facts is None:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise VitxError(f"{folder} cannot be read: permission denied")
        if (folder / FACTS).exists():
            raise VitxError(f"cannot read {folder / FACTS}: it is damaged, or another program's")
        raise VitxError(
            f"{folder} is of vitx 0.2 and has no {FACTS}: play it back with vitx 0.2, or train again"
        )
    try:
        return _read(folder, path, facts)
    except (KeyError, IndexError) as error:
        raise VitxError(
            f"the files in {folder} do not match each other ({error}): keep those of one training"
        ) from error


def _read(folder: Path, path: Path, facts: Mapping[str, Any]) -> Run:
    """Read the maps of the images that were watched last, by the methods that all their firings have."""
    firings, images = files_of(folder, FIRING), files_of(folder, IMAGES)
    if not firings:
        raise VitxError(f"{folder} holds no maps: the training ended before any were written")
    since = max((step for step in images if step <= max(firings)), default=None)
    if since is None:
        raise VitxError(f"{folder} holds maps, but not their images: copy the whole folder")
    steps = tuple(step for step in firings if step >= since)
    held, arrays = _arrays(images[since]), [_arrays(firings[step]) for step in steps]
    pixels, shown, labels, frames = held["pixels"], held["shown"], held.get("labels"), 1
    kept = {
        name: _stack(folder, steps, [one[name] for one in arrays], shown)
        for name in arrays[-1]
        if name == LOGITS or all(name in one for one in arrays)
    }
    logits, sinks = kept.pop(LOGITS), kept.pop(SINKS, None)
    if not kept:
        raise VitxError(f"the maps in {folder} have no method in common: keep those of one training")
    if pixels.ndim == 5:
        frames = len(evenly(pixels.shape[1], FRAMES_IN_A_CARD))
        kept = {name: _side_by_side(values, pixels.shape[1], 2) for name, values in kept.items()}
        pixels, sinks = _side_by_side(pixels, pixels.shape[1], 1), None
    marks = None if sinks is None else sinks > 0
    labels = None if labels is None else labels[shown]
    before, numbers, run = len(firings) - len(steps), _read_numbers(folder), run_of(folder)
    return Run(path, run, facts, numbers, steps, kept, logits, pixels, labels, frames, before, marks)


def _read_numbers(folder: Path) -> dict[str, dict[int, float]]:
    numbers: dict[str, dict[int, float]] = {}
    with _whole(folder / NUMBERS):
        rows = read_rows(folder)
    for row in rows:
        for tag, value in row.items():
            with suppress(TypeError, ValueError):  # an empty cell
                numbers.setdefault(tag, {})[int(row["step"])] = float(value)
    return {tag: dict(sorted(points.items())) for tag, points in numbers.items() if tag not in ("step", None)}


def _side_by_side(values: NDArray[Any], frames: int, axis: int) -> NDArray[Any]:
    """Put a few frames of clips, or their maps, side by side, so that they can be shown as wide images."""
    shown = [place * values.shape[axis] // frames for place in evenly(frames, FRAMES_IN_A_CARD)]
    return np.concatenate([values.take(place, axis) for place in shown], axis + 1)


def _stack(
    folder: Path, steps: Sequence[int], arrays: Sequence[NDArray[Any]], shown: NDArray[Any]
) -> NDArray[np.float32]:
    """Stack the arrays of all firings, (m, ...) each, for the images shown, (T, n, ...)."""
    for step, array in zip(steps, arrays, strict=True):
        if len(array) <= shown.max() or array.shape != arrays[-1].shape:
            raise VitxError(
                f"at step {step}, {folder} holds maps or logits {array.shape}, but {arrays[-1].shape} at the "
                f"last step, of {len(shown)} images: keep those of one training"
            )
    return np.stack([array[shown].astype(np.float32) for array in arrays])


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with _whole(path), np.load(path, allow_pickle=False) as file:
        return dict(file)


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        said = f"cannot read {path} ({type(error).__name__}): it is damaged; delete it to continue without it"
        raise VitxError(said) from error
