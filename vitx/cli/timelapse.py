"""Play a training back: one animated GIF of all images, and for each image a GIF and a strip of stills.

  vitx timelapse logs/demo/version_0 --output film
  vitx timelapse logs/demo/version_0 logs/shortcut/version_0     runs side by side
  vitx timelapse logs/                                           all runs below it

A run is a training with vitx's callback or watch, read from its folder `vitx`: see `vitx report --help`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitx.cli.options import add, output_folder
from vitx.cli.runs import add_runs, opened_runs
from vitx.files import write_png
from vitx.inputs.clips import evenly
from vitx.pictures import render
from vitx.pictures.captions import Caption
from vitx.pictures.gif import write_gif
from vitx.pictures.render import TILE_WIDTH, Picture
from vitx.runs.comparing import meetings
from vitx.runs.run import Run

_FRAMES, _STILLS = 60, 6  # at most, in a film and in a strip
_LARGE = 2 * TILE_WIDTH  # width of pictures in the film of a single image
_ACROSS = 4  # runs side by side; more are in rows


def add_options(command: Any) -> None:
    """Add the options of the command."""
    add_runs(command)
    add(command, "--output", "FOLDER", "where to write the files", default="timelapse")


def run(options: Any) -> int:
    """Write the films and strips, print their paths, and return the exit status."""
    output = output_folder(options)
    runs, left_out = opened_runs(options)
    images = range(min(run.count for run in runs.values()))
    for name, run in runs.items():
        if run.earlier:
            print(f"{name} is shown without {run.earlier}", file=sys.stderr)
    watched = [one for meeting in meetings([*runs.values()]) for one in meeting.images]
    if any(dict.fromkeys(range(len(runs)), image) not in watched for image in images):
        print("these runs do not watch the same images by the same methods", file=sys.stderr)
    _write(runs, images, output)
    return int(bool(left_out))


def _write(runs: Mapping[str, Run], images: Sequence[int], folder: Path) -> None:
    """Write the files one by one, and print the path of each."""
    moments = timeline(runs.values(), _FRAMES)
    if len(images) > 1:
        write_gif(folder / "all.gif", [frame(runs, moment, images) for moment in moments])
        print(folder / "all.gif")
    width = _LARGE if len(runs) == 1 else TILE_WIDTH
    for image in images:
        write_gif(folder / f"image-{image}.gif", [frame(runs, moment, [image], width) for moment in moments])
        print(folder / f"image-{image}.gif")
        write_png(folder / f"image-{image}.png", _strip(runs, image))
        print(folder / f"image-{image}.png")


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
    return render.joined(rows, axis=0)


def _strip(runs: Mapping[str, Run], image: int) -> Picture:
    """Draw an image of named runs at some firings of each, below the name of the run."""
    drawn = {f"{name}, image {image}": _stills(run, image) for name, run in runs.items()}
    return render.joined([render.beside({heading: one}) for heading, one in drawn.items()], axis=0)


def _stills(run: Run, image: int) -> Picture:
    """Draw a column for each firing, and a row for each method."""
    titles = [*run.titled]
    columns = {"input": render.resized([run.pixels[image]] * len(titles), TILE_WIDTH)}
    for firing in evenly(len(run.steps), _STILLS):
        tiles = run.tiles(firing, image)
        moment = run.heading(firing).replace(", ", "\n")
        column = [tiles[title] for title in titles]  # marks may have enlarged some
        columns[f"{moment}\n{run.captions(firing)[image]}"] = render.resized(column, TILE_WIDTH)
    rows = [Caption(title) for title in titles]
    return render.grid(columns, rows, run.facts["colormap"], note=run.facts["note"])
