"""Strips of stills: one image at some steps of a training."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from vitx.pictures import render
from vitx.pictures.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH, VERDICTS
from vitx.runs.film import Reel, evenly
from vitx.runs.run import Picture, Run


def strip(reel: Reel, image: int, most: int) -> Picture:
    """Draws one image at some firings: a column for each, a row for each method.

    Args:
        reel: the run, and its name.
        image: which one.
        most: firings; fewer are chosen evenly, the first and the last included.
    """
    run = reel.run
    firings = evenly(len(run.steps), most)
    drawn = [run.tiles(firing, image) for firing in firings]
    first, *titles = drawn[0]
    tiles = {title: [_scaled(pictures[title]) for pictures in drawn] for title in titles}
    start = _scaled(drawn[0][first])
    lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(1 + len(firings))]
    head, row = _head(run, firings, image), LINE + start.height + GAP
    width = lefts[-1] + TILE_WIDTH + GAP
    canvas = Image.new("RGB", (width, LINE + LINE * len(head[0]) + len(titles) * row), PAPER)
    draw = ImageDraw.Draw(canvas)
    name = f"{reel.name}, image {image}" if reel.name else f"image {image}"
    render.write(draw, (GAP, 3), name, INK, width - 2 * GAP, bold=True)
    for left, lines in zip(lefts[1:], head, strict=True):
        for number, (text, colour) in enumerate(lines):
            render.write(draw, (left, LINE * (1 + number) + 2), text, colour, TILE_WIDTH, bold=number == 0)
    top = canvas.height - len(titles) * row
    for title in titles:
        for left, picture in zip(lefts, [start, *tiles[title]], strict=True):
            canvas.paste(picture, (left, top + LINE))
        render.write(draw, (lefts[0], top + 3), first, FAINT, TILE_WIDTH)
        render.write(draw, (lefts[1], top + 3), title, FAINT, width - lefts[1])
        top += row
    return np.asarray(canvas)


def _head(run: Run, firings: Sequence[int], image: int) -> list[list[tuple[str, str]]]:
    """Returns what stands above each column: (text, colour) of each line, the same lines in all of them."""
    head = []
    for firing in firings:
        caption = run.captions(firing)[image]
        step, _, accuracy = run.heading(firing).partition(", ")
        said, _, truth = str(caption).partition(", is ")
        verdict = VERDICTS[caption.right]
        truth = f"is {truth}" if truth else ""
        head.append([(step, INK), (accuracy, FAINT), (said, verdict), (truth, verdict)])
    used = [any(text for text, _ in line) for line in zip(*head, strict=True)]
    return [[line for line, use in zip(lines, used, strict=True) if use] for lines in head]


def _scaled(picture: Picture) -> Image.Image:
    height = round(TILE_WIDTH * picture.shape[0] / picture.shape[1])
    return Image.fromarray(picture).resize((TILE_WIDTH, height), Image.Resampling.BICUBIC)
