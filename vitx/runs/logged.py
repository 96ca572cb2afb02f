"""What a training logged, in the one form in which all loggers' files are read."""

import bisect
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitx.errors import VitxError


@dataclass(frozen=True)
class Curve:
    """A scalar over the training; each step once.

    Attributes:
        steps: in order.
        values: one for each step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> "Curve":
        """Makes a curve of the values at some steps.

        Example:
            >>> Curve.of({7: 0.9, 3: 0.5})
            Curve(steps=(3, 7), values=(0.5, 0.9))
        """
        steps = tuple(sorted(values))
        return cls(steps, tuple(values[step] for step in steps))

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
class Logged:
    """What a logger holds of a run.

    Attributes:
        scalars: tag -> curve, in the order in which they were first logged, where that is known.
        grids: step -> the grid of the callback, as the bytes of a picture file.
        config: name -> text in YAML, of the settings.
    """

    scalars: Mapping[str, Curve] = field(default_factory=dict)
    grids: Mapping[int, bytes] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)


def decode(picture: bytes, what: str) -> NDArray[np.uint8]:
    """Returns a logged picture, (height, width, 3).

    Args:
        picture: the bytes of its file.
        what: it is, in words.

    Raises:
        VitxError: It is damaged.
    """
    try:
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise VitxError(f"cannot read {what} ({type(error).__name__}): it is damaged") from error


def library(module: str, extra: str) -> Any:
    """Imports what reads a logger's files.

    Raises:
        VitxError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise VitxError(
            f"{extra} is needed to read what it logged, and cannot be imported ({error}): pip install {extra}"
        ) from error
