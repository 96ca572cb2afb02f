"""Argument that names training runs, and the runs that it selects."""

import sys
from typing import Any

import torch

from vitx.cli.options import add
from vitx.runs.run import Run
from vitx.runs.saved import open_runs


def add_runs(command: Any) -> None:
    """Add the argument to a command."""
    add(command, "run", "RUN", "the folder of a run, or one above several", nargs="+")


def opened_runs(options: Any) -> tuple[dict[str, Run], dict[str, str]]:
    """Return name -> run, and name -> reason for runs that cannot be read, which are also printed."""
    torch.set_num_threads(1)  # on small arrays, synchronizing threads takes longer than the work
    runs, left_out = open_runs(options.run)
    for name, why in left_out.items():
        print(f"left out {name}: {why}", file=sys.stderr)
    return runs, left_out
