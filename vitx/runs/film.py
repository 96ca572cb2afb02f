"""Films of a training, or of several side by side, and strips of stills."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from vitx.inputs import clips
from vitx.pictures import render
from vitx.pictures.captions import Caption
from vitx.pictures.render import BETWEEN, TILE_WIDTH, Picture
from vitx.runs.run import Run

_ACROSS = 4  # runs side by side; more are in rows


def evenly(count: int, most: int) -> list[int]:
    """Choose up to `most` evenly spaced firings, first and last included; only the last if `most` is 1."""
    return [count - 1] if most == 1 else clips.evenly(count, most)


def timeline(runs: Iterable[Run], most: int) -> list[float]:
    """Return the share of the training at each of at most `most` frames, by the run with most firings."""
    leader = max(runs, key=lambda run: len(run.steps))
    return [leader.position(firing) for firing in evenly(len(leader.steps), most)]


def frame(
    runs: Mapping[str, Run], position: float, images: Sequence[int], tile_width: int = TILE_WIDTH
) -> Picture:
    """Draw named runs at a share of their training: each one's grid below its name, step and accuracy."""
    panels = []
    for name, run in runs.items():
        firing = run.nearest(position)
        panels.append((f"{name}\n{run.heading(firing)}", run.grid(firing, images, tile_width)))
    starts = range(0, len(panels), _ACROSS)
    rows = [render.beside(dict(panels[start : start + _ACROSS])) for start in starts]
    return render.joined(rows, 0, BETWEEN)


def strip(runs: Mapping[str, Run], image: int, most: int) -> Picture:
    """Draw an image of named runs at up to `most` firings each, below the name of the run."""
    drawn = [
        render.beside({f"{name}, image {image}": _stills(run, image, most)}) for name, run in runs.items()
    ]
    return render.joined(drawn, 0, BETWEEN)


def _stills(run: Run, image: int, most: int) -> Picture:
    """Draw a column for each firing, and a row for each method."""
    titles = [*run.titled]
    columns = {"input": _column([run.input(image)] * len(titles))}
    for firing in evenly(len(run.steps), most):
        tiles = run.tiles(firing, image)
        moment = run.heading(firing).replace(", ", "\n")
        columns[f"{moment}\n{run.captions(firing)[image]}"] = _column(tiles[title] for title in titles)
    return render.grid(columns, [Caption(title) for title in titles], run.colormap, note=run.note)


def _column(pictures: Iterable[Picture]) -> torch.Tensor:
    """Stack pictures of one aspect ratio; marks may have enlarged some."""
    return torch.from_numpy(np.stack([np.asarray(render.tile(one, TILE_WIDTH)) for one in pictures]))
