"""Strips of stills: one image at some steps of a training."""

import numpy as np
from PIL import Image, ImageDraw

from vitx.pictures import render
from vitx.pictures.render import FAINT, GAP, INK, LINE, PAPER, TILE_WIDTH, VERDICTS
from vitx.runs.film import Reel, evenly
from vitx.runs.run import Picture, Run


def strip(reel: Reel, image: int, most: int) -> Picture:
    """Draw one image at so many firings at most: a column for each, a row for each method."""
    run = reel.run
    firings = evenly(len(run.steps), most)
    drawn = [run.tiles(firing, image) for firing in firings]
    first, *titles = drawn[0]
    start = _scaled(drawn[0][first])
    lefts = [GAP + column * (TILE_WIDTH + GAP) for column in range(1 + len(firings))]
    heads = [_head(run, firing, image) for firing in firings]
    used = [place for place, line in enumerate(zip(*heads, strict=True)) if any(text for text, _ in line)]
    width, row = lefts[-1] + TILE_WIDTH + GAP, LINE + start.height + GAP
    canvas = Image.new("RGB", (width, LINE + LINE * len(used) + len(titles) * row), PAPER)
    draw = ImageDraw.Draw(canvas)
    name = f"{reel.name}, image {image}" if reel.name else f"image {image}"
    render.write(draw, (GAP, 3), name, INK, width - 2 * GAP, bold=True)
    for left, head in zip(lefts[1:], heads, strict=True):
        for number, place in enumerate(used):
            text, color = head[place]
            render.write(draw, (left, LINE * (1 + number) + 2), text, color, TILE_WIDTH, bold=number == 0)
    top = canvas.height - len(titles) * row
    for title in titles:
        for left, picture in zip(lefts, [start, *(_scaled(one[title]) for one in drawn)], strict=True):
            canvas.paste(picture, (left, top + LINE))
        render.write(draw, (lefts[0], top + 3), first, FAINT, TILE_WIDTH)
        render.write(draw, (lefts[1], top + 3), title, FAINT, width - lefts[1])
        top += row
    return np.asarray(canvas)


def _head(run: Run, firing: int, image: int) -> list[tuple[str, str]]:
    """Return the lines above a column, each with its color."""
    caption = run.captions(firing)[image]
    step, _, accuracy = run.heading(firing).partition(", ")
    said, _, truth = str(caption).partition(", is ")
    verdict = VERDICTS[caption.right]
    return [(step, INK), (accuracy, FAINT), (said, verdict), (f"is {truth}" if truth else "", verdict)]


def _scaled(picture: Picture) -> Image.Image:
    height = round(TILE_WIDTH * picture.shape[0] / picture.shape[1])
    return Image.fromarray(picture).resize((TILE_WIDTH, height), Image.Resampling.BICUBIC)
