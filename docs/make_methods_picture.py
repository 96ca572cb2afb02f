"""Make the picture of the same photographs explained by each method.

pip install scikit-image
python docs/make_methods_picture.py [WEIGHTS]

The photographs are scikit-image's: Chelsea the cat and a cup of coffee (CC0), and a rocket (public domain).
WEIGHTS is a file for deit_tiny_patch16_224; without it, timm's own weights are downloaded.
"""

import sys
from pathlib import Path

import timm
from PIL import Image
from skimage import data

import vitx
from vitx.attribution import title_of
from vitx.inputs.prepared import prepared
from vitx.models.checkpoints import model_of_weights
from vitx.models.classes import known_class_names, short
from vitx.pictures import render
from vitx.pictures.captions import captions_of

MODEL = "deit_tiny_patch16_224"


def main(weights: str | None = None) -> None:
    """Write docs/methods.png."""
    if weights is None:
        model = timm.create_model(MODEL, pretrained=True)
    else:
        model = model_of_weights(MODEL, Path(weights))
    photographs = [Image.fromarray(photograph()) for photograph in (data.chelsea, data.coffee, data.rocket)]
    images, _ = prepared(model, photographs)
    found = vitx.explain_methods(model, images, {name: {} for name in vitx.methods()})
    first = next(iter(found.values()))
    columns = {"input": first.pixels()}
    columns |= {title_of(name): explanation.overlays() for name, explanation in found.items()}
    names = [short(name) for name in known_class_names(1000) or ()]
    picture = render.grid(columns, captions_of(first.logits, class_names=names), tile_width=120)
    Image.fromarray(picture).save(Path(__file__).parent / "methods.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
