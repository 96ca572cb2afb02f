"""Saved runs: found by their folders, and read as `vitx.runs.folder` writes them."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitx.errors import VitxError, failure
from vitx.inputs.clips import evenly
from vitx.runs import FACTS, FIRING, FOLDER, IMAGES, LOGITS, NUMBERS, SINKS
from vitx.runs.folder import files_of, read_facts, read_rows
from vitx.runs.run import Run

FRAMES_IN_A_CARD = 4  # of a clip, in a picture as wide as TensorBoard shows it, and in a report


def open_runs(places: Sequence[str | Path]) -> tuple[dict[str, Run], dict[str, str]]:
    """Open the runs in some folders or below them.

    Return name -> run, in order of the names, and name -> reason for those that cannot be read. Raise a
    VitxError if none can be read.
    """
    runs, left_out = dict[str, Run](), dict[str, str]()
    for name, (path, folder) in _find(places).items():
        try:
            runs[name] = read_run(folder, path)
        except VitxError as error:  # reported without paths of this machine
            left_out[name] = str(error).replace(str(folder), str(path / folder.name), 1)
    if not runs:
        raise VitxError(next(iter(left_out.values())))
    return runs, left_out


def _find(places: Sequence[str | Path]) -> dict[str, tuple[Path, Path]]:
    """Return name -> (path as the user gave it, folder `vitx`) for each run, in order."""
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if not (here := [*_below(place)]):
            raise VitxError(
                f"{place} holds no run: neither it nor a folder below has a file {FOLDER}/{FACTS}, which "
                "RolloutCallback and Watch write unless save_maps=False"
            )
        found |= {folder.resolve(): _said(place, folder) for folder in here}
    runs = sorted(found.items(), key=lambda one: [_natural(part) for part in one[1].parts])
    # Folders just below the root may contain the name of a user.
    below = len({folder.parts[:2] for folder, _ in runs}) == 1
    names = names_apart([_called(_run_of(folder) if below else path, folder) for folder, path in runs])
    return {name: (path, folder) for name, (folder, path) in zip(names, runs, strict=True)}


def _called(path: Path, folder: Path) -> Path:
    """Replace the last part of a path by the name that a logger gave the run, if any."""
    loggers = (read_facts(folder) or {}).get("loggers") or ()
    title = next(filter(None, (one.get("title") for one in loggers)), None)
    return path.with_name(title.replace("/", "-")) if title and path.name else path


def _below(top: Path) -> Iterator[Path]:
    """Yield the folders `vitx` of runs, also of 0.2, then unreadable folders, so that they are reported."""
    if not top.is_dir():
        there = f"{top} is a file" if top.exists() else f"there is no folder {top}"
        raise VitxError(f"{there}: give the folder of a run, such as logs/demo/version_0, or one above it")
    closed: list[OSError] = []
    for where, folders, files in os.walk(top, onerror=closed.append):
        folder = Path(where)
        earlier = any(name.startswith("maps-") and name.endswith(".npz") for name in files)
        if (folder.name == FOLDER or folder == top) and (FACTS in files or earlier):
            yield folder
            folders.clear()
    yield from (Path(error.filename) for error in closed)


def _said(place: Path, folder: Path) -> Path:
    """Return the path of a run as the user gave it, never the full path on this machine."""
    run = _run_of(folder)
    said = Path(*place.parts[1:][-2:]) if place.is_absolute() else place
    path = Path(os.path.normpath(said / os.path.relpath(run, place)))
    return path if path.name not in ("", "..") else Path(run.resolve().name)


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Name runs, or other files, by the part of their paths that differs, as `a` in `logs/a/version_0`."""
    apart = [[*path.relative_to(path.anchor).parts] for path in paths]
    if len({(*parts[:1],) for parts in apart}) > 1 and len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]  # the paths share nothing
    for end in (0, -1):
        while all(apart) and len({parts[end] for parts in apart}) == 1:
            for parts in apart:
                parts.pop(end)
    names = ["/".join(parts or path.parts[-2:]) for parts, path in zip(apart, paths, strict=True)]
    again = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({times + 1})" if times else name for name, times in zip(names, again, strict=True)]


def _natural(text: str) -> list[str | int]:
    """Return a key that sorts version_2 before version_10: text and numbers alternate."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", text))]


def _run_of(folder: Path) -> Path:
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
    with failure(f"the files in {folder} do not match each other, so keep those of one training"):
        return _read(folder, path, {"colormap": "inferno", "note": ""} | facts)


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
    names = [name for name in arrays[-1] if name == LOGITS or all(name in one for one in arrays)]
    kept = {name: np.stack([one[name][shown] for one in arrays]).astype(np.float32) for name in names}
    logits, sinks = kept.pop(LOGITS), kept.pop(SINKS, None)
    if not kept:
        raise VitxError(f"the maps in {folder} have no method in common: keep those of one training")
    if pixels.ndim == 5:
        frames = min(pixels.shape[1], FRAMES_IN_A_CARD)
        kept = {name: _side_by_side(values, pixels.shape[1], 2) for name, values in kept.items()}
        pixels, sinks = _side_by_side(pixels, pixels.shape[1], 1), None
    marks = None if sinks is None else sinks > 0
    labels = None if labels is None else labels[shown]
    before, numbers, run = len(firings) - len(steps), _read_numbers(folder), _run_of(folder)
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


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with _whole(path), np.load(path, allow_pickle=False) as file:
        return dict(file)


def _whole(path: Path) -> AbstractContextManager[None]:
    said = f"cannot read {path}, so it is damaged; delete it to continue without it"
    return failure(said, lambda error: type(error).__name__)  # messages may hold paths of this machine
