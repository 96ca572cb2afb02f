"""What was found in one picture, as arrays."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Picture:
    """A picture that was read.

    Attributes:
        place: among all.
        file: it was read from.
        image: as the model takes it, without the dimension of the batch; None once it was explained.
        pixels: (H, W, 3) uint8, as it is shown; of clips and volumes (T, H, W, 3). None once it was drawn.
        note: what is to be said of its colours, or nothing.
    """

    place: int
    file: Path
    image: Tensor | None
    pixels: Tensor | None
    note: str


@dataclass(frozen=True)
class Map:
    """One map of a picture.

    Attributes:
        method: that found it.
        target: the class that it is about, or None.
        asked: how the target was asked for: the class, or None for the predicted one.
        values: (h, w), >= 0.
        signed: (h, w), below 0 where a patch speaks against the class; None for methods without a sign.
        against: the class that it is held against, or None.
        said: what is said of it, or None.
        question: what its target is called among the arrays, where that is no class.
        box: that it is about, (x0, y0, x1, y1) in pixels of the model's image; None: none.
        sinks: (h, w) bool, see `vitx.Explanation`; None where they are not known.
    """

    method: str
    target: int | None
    asked: int | None
    values: NDArray[np.floating[Any]]
    signed: NDArray[np.floating[Any]] | None = None
    against: int | None = None
    said: str | None = None
    question: str = ""
    box: tuple[float, ...] | None = None
    sinks: NDArray[np.bool_] | None = None

    @property
    def key(self) -> str:
        """What it is called among the arrays of a picture."""
        if self.question:
            return f"{self.method}_{self.question}"
        key = self.method if self.target is None else f"{self.method}_{self.target}"
        return key if self.against is None else f"{key}_not_{self.against}"


@dataclass(frozen=True)
class Finding(Picture):
    """What was found in one picture.

    Attributes:
        logits: (classes,).
        maps: one for each method and target.
    """

    logits: NDArray[np.floating[Any]]
    maps: tuple[Map, ...]

    @property
    def said(self) -> str:
        """What is said of its maps, or nothing."""
        return ", ".join(dict.fromkeys(one.said for one in self.maps if one.said and one.target is not None))

    def without_pixels(self) -> "Finding":
        """Returns the same without what takes the most room."""
        return replace(self, pixels=None)
