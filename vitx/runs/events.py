"""Reads the event files of TensorBoard."""

import bisect
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.errors import VitxError
from vitx.runs import GRIDS

EVENT_FILES = "events.out.tfevents*"


@dataclass(frozen=True)
class Curve:
    """A scalar over the training; each step once.

    Attributes:
        steps: in order.
        values: one for each step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, step: int) -> float | None:
        """Returns the last value at or before a step; None if there was none yet.

        Example:
            >>> curve = Curve((3, 7), (0.5, 0.9))
            >>> curve.at(0), curve.at(5), curve.at(7)
            (None, 0.5, 0.9)
        """
        place = bisect.bisect_right(self.steps, step)
        return self.values[place - 1] if place else None


@dataclass(frozen=True)
class Events:
    """What is in the event files of a run.

    Attributes:
        scalars: tag -> curve, in the order in which they were first logged.
        grids: step -> the grid of the callback, (height, width, 3) uint8.
    """

    scalars: dict[str, Curve]
    grids: dict[int, NDArray[np.uint8]]


def read_events(folder: Path, grids: bool = True) -> Events:
    """Reads all event files of a folder; where a resumed run took a step again, the last one holds.

    Args:
        folder: of the run.
        grids: whether the pictures are wanted.

    Raises:
        VitxError: A picture is damaged.
    """
    # 0 is for all of them; what is not asked for is not kept.
    sizes = {"scalars": 0, "images": 0 if grids else 1, "tensors": 1, "histograms": 1, "audio": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes).Reload()
    tags = events.Tags()
    scalars = {}
    for tag in tags["scalars"]:
        values = {event.step: event.value for event in events.Scalars(tag)}
        steps = tuple(sorted(values))
        scalars[tag] = Curve(steps, tuple(values[step] for step in steps))
    pictures = events.Images(GRIDS) if grids and GRIDS in tags["images"] else []
    return Events(scalars, {p.step: _pixels(p.encoded_image_string, folder) for p in pictures})


def _pixels(png: bytes, folder: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise VitxError(f"a picture in the event files of {folder} is damaged: {error}") from error
