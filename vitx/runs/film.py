"""Films of a training, or of several beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from PIL import Image, ImageDraw

from vitx.inputs import clips
from vitx.pictures import render
from vitx.pictures.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH
from vitx.runs.run import Picture, Run

_BAR = 4  # height of the bar that says where in the training a frame is
_BELOW = 3  # between heading and bar
_BETWEEN = 24  # between runs
_SCREEN = 16 / 10  # width to height


@dataclass(frozen=True)
class Reel:
    """What is filmed.

    Attributes:
        run: where the pictures come from.
        images: which of them are shown.
        name: written above it, where there are several.
    """

    run: Run
    images: Sequence[int]
    name: str | None = None


def evenly(count: int, most: int) -> list[int]:
    """Chooses firings evenly, the first and the last included; the last if there is but one.

    Example:
        >>> evenly(8, 4), evenly(3, 6), evenly(5, 1)
        ([0, 2, 5, 7], [0, 1, 2], [4])
    """
    return [count - 1] if most == 1 else clips.evenly(count, most)


def timeline(reels: Sequence[Reel], most: int) -> list[tuple[int, ...]]:
    """Says which firing of each run a frame shows: those nearest to each other in their trainings.

    Args:
        reels: the runs.
        most: frames; fewer are chosen evenly.

    Returns:
        For each frame, the place of the firing in each run's steps.
    """
    leader = max(reels, key=lambda reel: len(reel.run.steps))
    frames = []
    for firing in evenly(len(leader.run.steps), most):
        position = leader.run.position(firing)
        frames.append(tuple(reel.run.nearest(position) for reel in reels))
    return frames


def frame(reels: Sequence[Reel], firings: Sequence[int], tile_width: int = TILE_WIDTH) -> Picture:
    """Draws one moment: each run's grid under its name, step and accuracy, and a bar that fills up."""
    panels = [_panel(*both, tile_width) for both in zip(reels, firings, strict=True)]
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    count = len(panels)  # two always stand side by side, more in a screen's form
    columns = count if count < 3 else min(max(round(sqrt(_SCREEN * count * height / width)), 1), count)
    rows = [joined(panels[at : at + columns], axis=1) for at in range(0, count, columns)]
    return joined(rows, axis=0)


def _panel(reel: Reel, firing: int, tile_width: int) -> Picture:
    grid = reel.run.grid(firing, reel.images, tile_width)
    width, top = grid.shape[1], LINE if reel.name else 0
    canvas = Image.new("RGB", (width, top + LINE + _BELOW + _BAR + GAP + len(grid)), PAPER)
    draw = ImageDraw.Draw(canvas)
    if reel.name:
        render.write(draw, (GAP, 3), reel.name, INK, width - 2 * GAP, bold=True)
    render.write(draw, (GAP, top + 3), reel.run.heading(firing), INK, width - 2 * GAP, bold=not reel.name)
    top += LINE + _BELOW
    whole = width - 2 * GAP
    draw.rectangle((GAP, top, GAP + whole - 1, top + _BAR - 1), "#e4e4e4")
    if done := round(whole * reel.run.position(firing)):
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
