"""Makes the README's pictures from the event files of two runs.

python train_demo.py
python train_demo.py --config configs/shortcut.yaml
python docs/make_pictures.py logs/demo/version_0 logs/shortcut/version_0
"""

import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitx.render import font

FOLDER = Path(__file__).parent
GAP, HEADING = 24, 26


def main(demo: str, shortcut: str) -> None:
    """Writes docs/learning.png and docs/shortcut.png."""
    before, *_, after = grids(demo)
    cheated = grids(shortcut)[-1]
    beside({"before the first step": before, "after the last": after}).save(FOLDER / "learning.png")
    beside({"demo": after, "with a shortcut": cheated}).save(FOLDER / "shortcut.png")


def grids(run: str) -> list[Image.Image]:
    """Reads the grid of every firing of a run, in order."""
    events = EventAccumulator(run, size_guidance={"images": 0}).Reload()
    return [Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images("vitx/maps")]


def beside(pictures: dict[str, Image.Image]) -> Image.Image:
    """Sets pictures side by side under headings."""
    width = sum(picture.width + GAP for picture in pictures.values()) - GAP
    height = HEADING + max(picture.height for picture in pictures.values())
    canvas = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for heading, picture in pictures.items():
        draw.text((left + 6, 4), heading, "black", font(15, bold=True))
        canvas.paste(picture, (left, HEADING))
        left += picture.width + GAP
    return canvas


if __name__ == "__main__":
    main(*sys.argv[1:])
