"""Finds the runs in a place, whoever logged them, and opens them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from vitx.errors import VitxError
from vitx.methods import methods
from vitx.runs import FOLDER
from vitx.runs.claiming import Claims
from vitx.runs.folders import EVENT_FILES, GRID_FILES, TABLE, read_folder
from vitx.runs.logged import Logged
from vitx.runs.mlflow_store import database, is_database, is_folder, read_stored, stored_runs
from vitx.runs.playback import FromGrids, FromMaps, NoPictures, Playback
from vitx.runs.run import Run, names_apart
from vitx.runs.saved import load_maps
from vitx.runs.weights_and_biases import FILE, name_of, read_wandb

_CONFIGS = {"config.yaml", "hparams.yaml"}


@dataclass(frozen=True)
class Found:
    """A run that was found.

    Attributes:
        path: what it is called by: its folder, or its store with the names of experiment and run.
        read: reads what was logged, with or without the pictures.
        id: tells runs of one path apart.
        folder: that of saved maps which are its own, or None.
        bare: whether it is such a folder and nothing else.
        beside: folders of saved maps that may be its own, as its logger has no folder for each run.
    """

    path: Path
    read: Callable[[bool], Logged]
    id: str = ""
    folder: Path | None = None
    bare: bool = False
    beside: tuple[Path, ...] = ()


def find_runs(places: Sequence[str]) -> list[Found]:
    """Finds all runs in some places.

    Args:
        places: folders, databases of MLflow, or addresses of its stores.

    Returns:
        The runs in the order of their names, each once.

    Raises:
        VitxError: There is no such place, or no run in it.
    """
    found: dict[tuple[Path, str], Found] = {}
    for place in places:
        here = list(_in_place(place))
        if not here:
            raise VitxError(
                f"{place} holds neither event files nor saved maps: it is not the folder of a run"
            )
        found |= {(run.path.resolve(), run.id): run for run in here}
    bare = tuple(run.folder for run in found.values() if run.folder and run.bare)
    runs = [replace(run, beside=(*run.beside, *bare)) if run.beside else run for run in found.values()]
    return sorted(runs, key=lambda run: [_natural(part) for part in (*run.path.parts, run.id)])


def name_runs(found: Sequence[Found]) -> list[str]:
    """Names runs by what tells them apart, and those of one name by their ids, too."""
    names = names_apart([run.path for run in found])
    return [
        f"{name} ({run.id})" if names.count(name) > 1 else name
        for name, run in zip(names, found, strict=True)
    ]


def open_runs(found: Sequence[Found]) -> Iterator[tuple[Found, Run | VitxError]]:
    """Opens one run after the other, or says why it cannot be read.

    Folders of maps alone come last: they may be those of a run that logged elsewhere, and are no run then.
    """
    claims = Claims()
    for one in sorted(found, key=lambda one: one.bare):
        if one.folder and one.folder.resolve() in claims.taken:
            continue
        try:
            yield one, _open(one, claims)
        except VitxError as error:
            yield one, error


def open_run(place: str | Path) -> Run:
    """Opens the one run in a place.

    Raises:
        VitxError: There is no run, or more than one, or none with pictures, or a file is damaged.
    """
    found = find_runs([str(place)])
    opened = dict(open_runs(found))
    if len(opened) > 1:
        some = ", ".join([str(one.path) for one in found if one in opened][:8])
        raise VitxError(f"{place} holds {len(opened)} runs: give one of {some}{', ...' * (len(opened) > 8)}")
    (run,) = opened.values()
    return with_pictures(run)


def with_pictures(run: Run | VitxError) -> Run:
    """Returns a run, or raises a VitxError if it could not be read or logged no pictures."""
    if isinstance(run, VitxError):
        raise run
    if not run.playback.count:
        raise VitxError(
            f"{run.path} holds no pictures to play back: RolloutCallback was not there, or wrote to another "
            "logger; its save_maps=True keeps them in the folder"
        )
    return run


def _open(found: Found, claims: Claims) -> Run:
    saved = load_maps(found.folder) if found.folder else None
    logged = found.read(saved is None)
    if saved is None and logged.grids:
        saved = claims.claim(logged.grids, found.beside, found.path)
    playback: Playback = NoPictures()
    if saved is not None:
        playback = FromMaps(saved)
    elif logged.grids:
        used = [tag.split("/")[1] for tag in logged.scalars if re.fullmatch("vitx/[^/]+/entropy", tag)]
        playback = FromGrids(logged.grids, [*used, *methods()], found.path)
    return Run(found.path, playback, logged.scalars, logged.config)


def _in_place(place: str) -> Iterator[Found]:
    """Finds the runs in one place."""
    path = Path(place)
    if re.match(r"[a-z][a-z0-9+.-]+://", place):
        yield from _of_store(place, database(place) or Path(place.rstrip("/").rpartition("/")[2]))
    elif path.is_file() and is_database(path):
        yield from _of_store(f"sqlite:///{path.absolute()}", path)
    elif path.is_dir():
        yield from _in_folder(path)
    elif path.exists():
        raise VitxError(f"{path} is neither a folder nor an MLflow database")
    else:
        raise VitxError(f"there is no folder {path}: give that of a run, such as logs/demo/version_0")


def _in_folder(top: Path) -> Iterator[Found]:
    """Finds the runs in a folder and below it."""
    logs: set[Path] = set()  # with event files
    resumed: dict[tuple[Path, str], list[Path]] = {}
    for where, folders, files in os.walk(top):
        folder = Path(where)
        if wandb := [folder / name for name in files if fnmatch(name, FILE)]:
            resumed.setdefault((folder.parent, wandb[0].stem), []).append(wandb[0])
            folders.clear()
        elif is_folder(folder):
            yield from _of_store(folder.absolute().as_uri(), folder)
            folders.clear()
        else:
            yield from _of_logs(folder, files, logs)
            for name in files:
                if name.endswith((".db", ".sqlite")) and is_database(folder / name):
                    yield from _of_store(f"sqlite:///{(folder / name).absolute()}", folder / name)
    for (folder, _), parts in resumed.items():
        parts.sort(key=lambda part: part.parent.name.rpartition("run-")[2])  # by date and time
        run_id = parts[0].stem.removeprefix("run-")
        beside = (folder.resolve().parent / FOLDER,)
        try:
            yield Found(folder / name_of(parts[0]), partial(read_wandb, parts), run_id, beside=beside)
        except VitxError as error:
            yield _unreadable(parts[0].parent, error)


def _of_logs(folder: Path, files: Sequence[str], logs: set[Path]) -> Iterator[Found]:
    """Finds the run that logged into a folder itself, with TensorBoard, CSV files, or vitx alone."""
    maps = folder / FOLDER
    kept = any(next(maps.glob(pattern), None) for pattern in ("maps-*.npz", GRID_FILES))
    own = kept or not _CONFIGS.isdisjoint(files)
    if any(fnmatch(name, EVENT_FILES) for name in files):
        logs.add(folder)
        # Writers put a part of what they log into folders below that of their run.
        logged = own or logs.isdisjoint(folder.parents)
    else:
        logged = own and TABLE in files
    if logged or kept:
        yield Found(folder, partial(read_folder, folder), folder=maps if kept else None, bare=not logged)


def _of_store(uri: str, path: Path) -> Iterator[Found]:
    """Finds the runs in a store of MLflow; maps lie where the training was started, or in it."""
    beside = (path.resolve().parent / FOLDER, path / FOLDER)
    try:
        runs = stored_runs(uri)
    except VitxError as error:
        yield _unreadable(path, error)
        return
    for run in runs:
        yield Found(path / run.experiment / run.name, partial(read_stored, run), run.id[:8], beside=beside)


def _unreadable(path: Path, error: VitxError) -> Found:
    """What stands for a run, or a store, of which not even the names can be read."""

    def read(_: bool) -> Logged:
        raise error

    return Found(path, read)


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sorts version_2 before version_10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", text)
    ]
