"""Find runs by their folders, and open them."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vitx.errors import VitxError
from vitx.runs import FACTS, FOLDER
from vitx.runs.folder import read_facts
from vitx.runs.run import Run
from vitx.runs.saved import read_run, run_of


def open_runs(places: Sequence[str | Path]) -> tuple[dict[str, Run], dict[str, str]]:
    """Open the runs in some folders or below them.

    Return name -> run, in order of the names, and name -> reason for those that cannot be read.
    Raise a VitxError if none can be read.
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
    names = names_apart([_called(run_of(folder) if below else path, folder) for folder, path in runs])
    return {name: (path, folder) for name, (folder, path) in zip(names, runs, strict=True)}


def _called(path: Path, folder: Path) -> Path:
    """Return the path, with the name that a logger gave the run, if any, as its last part."""
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
    run = run_of(folder)
    said = Path(*place.parts[1:][-2:]) if place.is_absolute() else place
    path = Path(os.path.normpath(said / os.path.relpath(run, place)))
    return path if path.name not in ("", "..") else Path(run.resolve().name)


def names_apart(paths: Sequence[Path]) -> list[str]:
    """Name runs, or other files, by the part of their paths that differs.

    Example:
        >>> names_apart([Path("logs/demo/version_0"), Path("logs/shortcut/version_0")])
        ['demo', 'shortcut']
    """
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
