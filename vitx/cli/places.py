"""The runs that a command is given."""

import sys

from jsonargparse import ArgumentParser, Namespace

from vitx.cli.formatting import add
from vitx.runs.finding import open_runs
from vitx.runs.run import Run


def add_places(options: ArgumentParser) -> None:
    """Adds what says which runs are wanted."""
    add(options, "run", "RUN", "the folder of a run, or one above several", nargs="+")
    add(options, "--only", "NAME", "only runs of these names; * is anything", nargs="+")


def open_places(options: Namespace) -> tuple[dict[str, Run], dict[str, str]]:
    """Opens the runs that were asked for, and says which are not shown.

    Returns:
        The runs by their names, and name -> why of those that cannot be read.
    """
    runs, left_out = open_runs(options.run, options.only)
    for name, why in left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    return runs, left_out
