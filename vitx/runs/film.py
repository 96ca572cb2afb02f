"""Films of a training, or of two beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vitx import render
from vitx.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH
from vitx.runs.playback import Picture
from vitx.runs.run import Run

_BAR = 4  # height of the bar that says where in the training a frame is
_BELOW = 3  # between heading and bar
_BETWEEN = 24  # between two runs


@dataclass(frozen=True)
class Reel:
    """What is filmed.

    Attributes:
        run: where the pictures come from.
        images: which of them are shown.
        name: written above it, where there are two.
    """

    run: Run
    images: Sequence[int]
    name: str | None = None

    def position(self, firing: int) -> float:
        """Where in the training a firing is, in [0, 1]."""
        steps = self.run.playback.steps
        return steps[firing] / max(steps[-1], 1)


def evenly(count: int, most: int) -> list[int]:
    """Chooses places evenly, the first and the last included.

    Example:
        >>> evenly(8, 4), evenly(3, 6), evenly(5, 1)
        ([0, 2, 5, 7], [0, 1, 2], [4])
    """
    if most == 1:
        return [count - 1]
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most))})


def timeline(reels: Sequence[Reel], most: int) -> list[tuple[int, ...]]:
    """Says which firing of each run a frame shows: those nearest to each other in their trainings.

    Args:
        reels: the runs.
        most: frames; fewer are chosen evenly.

    Returns:
        For each frame, the place of the firing in each run's steps.
    """
    leader = max(reels, key=lambda reel: len(reel.run.playback.steps))
    frames = []
    for firing in evenly(len(leader.run.playback.steps), most):
        position = leader.position(firing)
        frames.append(tuple(_nearest(reel, position) for reel in reels))
    return frames


def _nearest(reel: Reel, position: float) -> int:
    firings = range(len(reel.run.playback.steps))
    return min(firings, key=lambda firing: abs(reel.position(firing) - position))


def frame(reels: Sequence[Reel], firings: Sequence[int], tile_width: int = TILE_WIDTH) -> Picture:
    """Draws one moment: each run's grid under its name, step and accuracy, and a bar that fills up."""
    panels = [_panel(*both, tile_width) for both in zip(reels, firings, strict=True)]
    return joined(panels, axis=1)


def _panel(reel: Reel, firing: int, tile_width: int) -> Picture:
    grid = reel.run.playback.grid(firing, reel.images, tile_width)
    width, top = grid.shape[1], LINE if reel.name else 0
    canvas = Image.new("RGB", (width, top + LINE + _BELOW + _BAR + GAP + len(grid)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if reel.name:
        render.write(draw, (GAP, 3), reel.name, INK, width - 2 * GAP, bold=True)
    render.write(draw, (GAP, top + 3), reel.run.heading(firing), INK, width - 2 * GAP, bold=not reel.name)
    top += LINE + _BELOW
    whole = width - 2 * GAP
    draw.rectangle((GAP, top, GAP + whole - 1, top + _BAR - 1), "#e4e4e4")
    if done := round(whole * reel.position(firing)):
        draw.rectangle((GAP, top, GAP + done - 1, top + _BAR - 1), FAINT)
    canvas.paste(Image.fromarray(grid), (0, top + _BAR + GAP))
    return np.asarray(canvas)


def joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """Sets pictures below each other (axis 0) or side by side (axis 1)."""
    other = 1 - axis
    long = max(picture.shape[other] for picture in pictures)
    parts = []
    for number, picture in enumerate(pictures):
        room = [(0, 0)] * 3
        room[other] = (0, long - picture.shape[other])
        room[axis] = (_BETWEEN if number else 0, 0)
        parts.append(np.pad(picture, room, constant_values=255))
    return np.concatenate(parts, axis)
