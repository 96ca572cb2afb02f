"""Play a training back: one animated GIF of all images, and for each image a GIF and a strip of stills.

  vitx timelapse logs/demo/version_0 --output film
  vitx timelapse logs/demo/version_0 logs/shortcut/version_0     runs side by side
  vitx timelapse logs/                                           all runs below it

A run is a training with vitx's callback or watch, read from its folder `vitx`: see `vitx report --help`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitx.cli.options import add, check_folder
from vitx.cli.runs import add_runs, one_thread, opened_runs
from vitx.files import write_png
from vitx.pictures.gif import write_gif
from vitx.pictures.render import TILE_WIDTH
from vitx.runs.comparing import meetings
from vitx.runs.film import frame, strip, timeline
from vitx.runs.run import Run

_FRAMES, _STILLS = 60, 6  # at most, in a film and in a strip
_LARGE = 2 * TILE_WIDTH  # width of pictures in the film of a single image


def add_options(command: Any) -> None:
    """Add the options of the command."""
    add_runs(command)
    add(command, "--output", "FOLDER", "where to write the files", default="timelapse")


@one_thread()
def run(options: Any) -> int:
    """Write the films and strips, print their paths, and return the exit status."""
    output = Path(options.output)
    check_folder(output)
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
        write_png(folder / f"image-{image}.png", strip(runs, image, _STILLS))
        print(folder / f"image-{image}.png")
