"""The runs that a command is given."""

import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from vitx.errors import VitxError
from vitx.runs.finding import Found, find_runs, name_runs, open_runs, with_pictures
from vitx.runs.run import Run

RUN = "a run, a folder with several, or an MLflow store"
ONLY = "only runs of these names; * stands for anything"


def open_places(places: Sequence[str], only: Sequence[str] | None) -> tuple[dict[str, Run], dict[str, str]]:
    """Opens all runs in some places.

    Args:
        places: as `find_runs` takes them.
        only: patterns of the names of those that are wanted; None: all.

    Returns:
        The runs by their names, at least one of which has pictures, and why others cannot be read.

    Raises:
        VitxError: There are no such runs, none has pictures, or the only one is damaged.
    """
    found = _chosen(find_runs(places), only)
    opened = dict(open_runs(found))
    order = [one for one in found if one in opened]
    runs: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name, one in zip(name_runs(order), order, strict=True):
        run = opened[one]
        if isinstance(run, VitxError):
            left_out[name] = str(run)
        elif run.playback.count or run.scalars:
            runs[name] = run
        else:
            left_out[name] = "nothing was logged"
    if not any(run.playback.count for run in runs.values()):
        # Of one run, or of several, the first says it for all.
        raise next(filter(None, map(_why, opened.values())))
    return runs, left_out


def _why(run: Run | VitxError) -> VitxError | None:
    try:
        with_pictures(run)
    except VitxError as error:
        return error
    return None


def _chosen(found: Sequence[Found], only: Sequence[str] | None) -> Sequence[Found]:
    if only is None:
        return found
    names = name_runs(found)
    chosen = [
        run
        for run, name in zip(found, names, strict=True)
        if name in only or any(fnmatchcase(name, pattern) for pattern in only)
    ]
    if not chosen:
        some = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
        raise VitxError(f"no run is called {' or '.join(only)}: there are {some}")
    return chosen


def say_left_out(left_out: Mapping[str, str]) -> None:
    """Tells on the console which runs are not shown."""
    for name, why in left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
