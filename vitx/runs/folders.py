"""Reads the folder of a run, as Lightning's loggers for TensorBoard and CSV write it, and as vitx does."""

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.runs import FOLDER, GRIDS
from vitx.runs.logged import Curve, Logged

EVENT_FILES = "events.out.tfevents*"
TABLE = "metrics.csv"
GRID_FILES = f"{GRIDS.replace('/', '-')}-*.png"  # where no logger takes pictures
_CONFIGS = ("config.yaml", "hparams.yaml")


def read_folder(folder: Path, grids: bool) -> Logged:
    """Reads what is in the folder of a run, but for saved maps.

    Args:
        folder: of the run.
        grids: whether the pictures are wanted.
    """
    logged = _read_events(folder, grids) if any(folder.glob(EVENT_FILES)) else Logged(_read_table(folder))
    configs = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    config = {path.name: path.read_text("utf-8", "replace") for path in configs}
    pictures = logged.grids or (_grid_files(folder / FOLDER) if grids else {})
    return Logged(logged.scalars, pictures, config)


def _read_events(folder: Path, grids: bool) -> Logged:
    """Reads all event files; where a resumed run took a step again, the last one holds."""
    # 0 is for all of them; what is not asked for is not kept.
    sizes = {"scalars": 0, "images": 0 if grids else 1, "tensors": 1, "histograms": 1, "audio": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes).Reload()
    tags = events.Tags()
    scalars = {
        tag: Curve.of({event.step: event.value for event in events.Scalars(tag)}) for tag in tags["scalars"]
    }
    pictures = events.Images(GRIDS) if grids and GRIDS in tags["images"] else []
    return Logged(scalars, {picture.step: picture.encoded_image_string for picture in pictures})


def _read_table(folder: Path) -> Mapping[str, Curve]:
    """Reads what CSVLogger wrote: a line for each call, with gaps."""
    values: dict[str, dict[int, float]] = {}
    if (folder / TABLE).is_file():
        with (folder / TABLE).open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                for tag, value in row.items():
                    with suppress(TypeError, ValueError):  # a gap, or no number
                        values.setdefault(tag, {})[int(row["step"])] = float(value)
    return {tag: Curve.of(points) for tag, points in values.items() if points and tag != "step"}


def _grid_files(folder: Path) -> dict[int, bytes]:
    """Finds the grids that the callback wrote where no logger takes pictures."""
    steps = {path: path.stem.rsplit("-", 1)[1] for path in folder.glob(GRID_FILES)}
    return {int(step): path.read_bytes() for path, step in steps.items() if step.isdecimal()}
