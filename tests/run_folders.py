"""Readers of the folders that runs leave behind."""

from pathlib import Path

import numpy as np

from vitx.runs import FIRING
from vitx.runs.folder import files_of


def kept(place: Path) -> Path:
    """Return the folder `vitx` of the only run in or below a place."""
    (facts,) = place.rglob("run.json")
    return facts.parent


def steps(place: Path) -> list[int]:
    """Return the steps at which maps were saved; an empty list without a run."""
    return list(files_of(kept(place), FIRING)) if list(place.rglob("run.json")) else []


def firing(place: Path, step: int) -> dict[str, np.ndarray]:
    """Return the arrays that were saved at a step."""
    with np.load(files_of(kept(place), FIRING)[step]) as arrays:
        return dict(arrays)
