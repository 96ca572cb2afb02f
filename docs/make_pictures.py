"""Makes the README's pictures from the event files of two runs.

python train_demo.py
python train_demo.py --config configs/shortcut.yaml
python docs/make_pictures.py logs/demo/version_0 logs/shortcut/version_0
"""

import io
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.render import beside

FOLDER = Path(__file__).parent


def main(demo: str, shortcut: str) -> None:
    """Writes docs/learning.png and docs/shortcut.png."""
    before, *_, after = grids(demo)
    cheated = grids(shortcut)[-1]
    learning = beside({"before the first step": before, "after the last": after})
    shortcuts = beside({"demo": after, "with a shortcut": cheated})
    Image.fromarray(learning).save(FOLDER / "learning.png")
    Image.fromarray(shortcuts).save(FOLDER / "shortcut.png")


def grids(run: str) -> list[NDArray[np.uint8]]:
    """Reads the grid of every firing of a run, in order."""
    events = EventAccumulator(run, size_guidance={"images": 0}).Reload()
    return [
        np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images("vitx/maps")
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
