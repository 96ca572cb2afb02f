"""Readers of the folders that runs leave behind."""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.runs import FIRING
from vitx.runs.folder import files_of


def events(folder: str | Path) -> EventAccumulator:
    """Return all pictures and numbers that TensorBoard reads from a folder."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


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


def shown(folder: str | Path) -> list[int]:
    """Return the steps at which TensorBoard shows a picture, which are those of its numbers."""
    found = events(folder)
    steps = [event.step for event in found.Images("vitx/maps")]
    assert steps == [event.step for event in found.Scalars("vitx/rollout/entropy")]
    return steps
