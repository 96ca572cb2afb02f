"""Films of a training, or of several side by side, and strips of stills."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from PIL import Image, ImageDraw

from vitx.inputs import clips
from vitx.pictures import render
from vitx.pictures.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH, VERDICTS, Picture, joined
from vitx.runs.run import Run

_BAR = 4  # height of the bar that shows the place of a frame in the training
_BELOW = 3  # between heading and bar
BETWEEN = 24  # between runs
_SCREEN = 16 / 10  # width to height


@dataclass(frozen=True)
class Reel:
    """The images of a run to film, and the name of the run if there are several."""

    run: Run
    images: Sequence[int]
    name: str | None = None


def evenly(count: int, most: int) -> list[int]:
    """Choose up to `most` evenly spaced firings, first and last included; only the last if `most` is 1."""
    return [count - 1] if most == 1 else clips.evenly(count, most)


def timeline(reels: Sequence[Reel], most: int) -> list[tuple[int, ...]]:
    """Return the firings of all runs for each of at most `most` frames, matched by training progress."""
    leader = max(reels, key=lambda reel: len(reel.run.steps)).run
    positions = map(leader.position, evenly(len(leader.steps), most))
    return [tuple(reel.run.nearest(position) for reel in reels) for position in positions]


def frame(reels: Sequence[Reel], firings: Sequence[int], tile_width: int = TILE_WIDTH) -> Picture:
    """Draw one moment: each run's grid below its name, step, accuracy and progress bar."""
    panels = [_panel(*both, tile_width) for both in zip(reels, firings, strict=True)]
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    count = len(panels)  # two are side by side; more fill the shape of a screen
    columns = count if count < 3 else min(max(round(sqrt(_SCREEN * count * height / width)), 1), count)
    rows = [joined(panels[at : at + columns], 1, BETWEEN) for at in range(0, count, columns)]
    return joined(rows, 0, BETWEEN)


def _panel(reel: Reel, firing: int, tile_width: int) -> Picture:
    grid = reel.run.grid(firing, reel.images, tile_width)
    lines = [*filter(None, (reel.name, reel.run.heading(firing)))]
    whole, top = grid.shape[1] - 2 * GAP, len(lines) * LINE + _BELOW
    canvas = Image.new("RGB", (grid.shape[1], top + _BAR + GAP + len(grid)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        render.write(draw, (GAP, number * LINE + 3), line, INK, whole, bold=number == 0)
    draw.rectangle((GAP, top, GAP + whole - 1, top + _BAR - 1), "#e4e4e4")
    if done := round(whole * reel.run.position(firing)):
        draw.rectangle((GAP, top, GAP + done - 1, top + _BAR - 1), FAINT)
    canvas.paste(Image.fromarray(grid), (0, top + _BAR + GAP))
    return np.asarray(canvas)


def strip(reel: Reel, image: int, most: int) -> Picture:
    """Draw one image at up to `most` firings: a column for each firing, a row for each method."""
    run, firings = reel.run, evenly(len(reel.run.steps), most)
    drawn = [run.tiles(firing, image) for firing in firings]
    first, *titles = drawn[0]
    start = render.tile(drawn[0][first], TILE_WIDTH)
    lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(1 + len(firings))]
    heads = [_head(run, firing, image) for firing in firings]
    used = [place for place, line in enumerate(zip(*heads, strict=True)) if any(text for text, _ in line)]
    width, row = lefts[-1] + TILE_WIDTH + GAP, LINE + start.height + GAP
    top = LINE + LINE * len(used)
    canvas = Image.new("RGB", (width, top + len(titles) * row), PAPER)
    draw = ImageDraw.Draw(canvas)
    name = f"{reel.name}, image {image}" if reel.name else f"image {image}"
    render.write(draw, (GAP, 3), name, INK, width - 2 * GAP, bold=True)
    for left, head in zip(lefts[1:], heads, strict=True):
        for number, place in enumerate(used):
            render.write(draw, (left, LINE * (1 + number) + 2), *head[place], TILE_WIDTH, bold=number == 0)
    for at, title in enumerate(titles):
        tiles = [start, *(render.tile(one[title], TILE_WIDTH) for one in drawn)]
        for left, picture in zip(lefts, tiles, strict=True):
            canvas.paste(picture, (left, top + at * row + LINE))
        render.write(draw, (lefts[0], top + at * row + 3), first, FAINT, TILE_WIDTH)
        render.write(draw, (lefts[1], top + at * row + 3), title, FAINT, width - lefts[1])
    return np.asarray(canvas)


def _head(run: Run, firing: int, image: int) -> list[tuple[str, str]]:
    """Return the lines above a column, each with its color."""
    caption = run.captions(firing)[image]
    step, _, accuracy = run.heading(firing).partition(", ")
    said, _, truth = str(caption).partition(", is ")
    verdict = VERDICTS[caption.right]
    return [(step, INK), (accuracy, FAINT), (said, verdict), (f"is {truth}" if truth else "", verdict)]
