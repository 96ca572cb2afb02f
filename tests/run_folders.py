"""The folders that runs leave behind."""

from pathlib import Path

import numpy as np

from vitx.runs import FIRING
from vitx.runs.folder import files_of


def kept(place: Path) -> Path:
    """The folder `vitx` of the one run in a place or below it."""
    (facts,) = place.rglob("run.json")
    return facts.parent


def steps(place: Path) -> list[int]:
    """The steps at which maps were kept; none without a run."""
    return list(files_of(kept(place), FIRING)) if list(place.rglob("run.json")) else []


def firing(place: Path, step: int) -> dict[str, np.ndarray]:
    """What was kept at a step."""
    with np.load(files_of(kept(place), FIRING)[step]) as arrays:
        return dict(arrays)
