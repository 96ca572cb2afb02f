"""Make the picture of a photograph without and with a watermark, the class that DeiT predicts, and its map.

pip install -e ".[bench]" pooch
python docs/make_watermark_picture.py [WEIGHTS]

The photograph is SciPy's `ascent` (public domain), which SciPy downloads. WEIGHTS is a file for
deit_tiny_patch16_224; without it, timm's own weights are downloaded.
"""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.datasets import ascent
from torch import nn

import vitx
from vitx.files import write_png
from vitx.inputs.prepared import preprocessing_of
from vitx.pictures import render
from vitx.pictures.captions import captions_said

FOLDER = Path(__file__).parent
sys.path.append(str(FOLDER.parent / "benchmarks"))

from faithfulness import normalized  # noqa: E402
from watermark import MODEL, Watermark, model_of, packaged_font  # noqa: E402

PART = (0, 69, 512, 468)  # crop of the photograph: x0, y0, x1, y1
TILE = 215


def explained(model: nn.Module, photograph: Image.Image) -> NDArray[np.uint8]:
    """Draw a photograph next to the map of the class that the model predicts."""
    explanation = vitx.explain(model, normalized(photograph, preprocessing_of(model))[None], "evidence")
    columns = {"DeiT-Tiny says:": explanation.pixels(), "evidence for it": explanation.overlays()}
    return render.grid(columns, captions_said(explanation.logits, None), tile_width=TILE)


def main(weights: str | None = None) -> None:
    """Write docs/watermark.png."""
    model = model_of(MODEL, Path(weights) if weights else None)
    photograph = Image.fromarray(ascent().astype(np.uint8)).convert("RGB").crop(PART)
    squashed = photograph.resize(preprocessing_of(model).size[::-1], Image.Resampling.BICUBIC)
    both = {
        "without a watermark": explained(model, squashed),
        "the same with a watermark": explained(model, Watermark(packaged_font()).on(squashed)),
    }
    write_png(FOLDER / "watermark.png", render.beside(both))


if __name__ == "__main__":
    main(*sys.argv[1:])
