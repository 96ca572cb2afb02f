"""Make the film and the picture of the README from the logs of two runs.

python train_demo.py
python train_demo.py --config configs/demo.yaml --config configs/shortcut.yaml
python docs/make_pictures.py logs/demo/version_0 logs/shortcut/version_0
"""

import sys
from pathlib import Path

from vitx.files import write_png
from vitx.pictures.gif import write_gif
from vitx.runs.film import Reel, frame, timeline
from vitx.runs.finding import open_runs

FOLDER = Path(__file__).parent
FILMED = (0, 4)  # few images, so that the film leaves room for the text about it


def main(demo: str, shortcut: str) -> None:
    """Write docs/learning.gif and docs/shortcut.png."""
    opened, _ = open_runs([demo, shortcut])
    runs = dict(zip(("the demo", "with a mark that tells the digit"), opened.values(), strict=True))
    reels = [Reel(run, FILMED, name) for name, run in runs.items()]
    write_gif(FOLDER / "learning.gif", [frame(reels, moment) for moment in timeline(reels, most=60)])
    whole = [Reel(run, range(run.count), name) for name, run in runs.items()]
    write_png(FOLDER / "shortcut.png", frame(whole, timeline(whole, most=1)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
