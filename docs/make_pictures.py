"""Make the film and the picture of the README from the logs of two runs.

python train_demo.py
python train_demo.py --config configs/demo.yaml --config configs/shortcut.yaml
python docs/make_pictures.py logs/demo/version_0 logs/shortcut/version_0
"""

import sys
from pathlib import Path

from vitx.cli.timelapse import frame, timeline
from vitx.files import write_png
from vitx.pictures.gif import write_gif
from vitx.runs.saved import open_runs

FOLDER = Path(__file__).parent
FILMED = (0, 4)  # few images, so that the film leaves room for the text about it


def main(demo: str, shortcut: str) -> None:
    """Write docs/learning.gif and docs/shortcut.png."""
    opened, _ = open_runs([demo, shortcut])
    runs = dict(zip(("the demo", "with a mark that tells the digit"), opened.values(), strict=True))
    moments = timeline(runs.values(), most=60)
    write_gif(FOLDER / "learning.gif", [frame(runs, moment, FILMED) for moment in moments])
    write_png(FOLDER / "shortcut.png", frame(runs, 1, range(min(run.count for run in runs.values()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
