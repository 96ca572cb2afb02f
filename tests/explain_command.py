"""A small model and a folder of pictures for `vitx explain`, and what it writes."""

import json

import numpy as np
import timm
from PIL import Image
from safetensors.torch import save_file

from tests import models

NAME = "deit_tiny_patch16_224"
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
ALONE = ("accelerator=cpu", "workers=1")


def tiny(classes=7, **overrides):
    return models.spread(timm.create_model(NAME, num_classes=classes, **(OPTIONS | overrides))).eval()


def save_weights(path):
    save_file(tiny().state_dict(), path)
    return path


def write_photos(made):
    """Return a folder of five pictures, some nested or oddly named, and two files that are not images."""
    generator = np.random.default_rng(0)
    (made / "deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/c d \N{SNOWMAN}.png", "-dash.png"):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(made / name)
    (made / "text.jpg").write_text("no picture")
    (made / "broken.jpg").write_bytes((made / "b.jpg").read_bytes()[:300])
    return made


def command(*words, weights, options=OPTIONS):
    model = ["--model", NAME, "--weights", str(weights), "--model-options", json.dumps(options)]
    running = [] if "--run-options" in words else ["--run-options", *ALONE]
    return ["explain", *map(str, words), *model, *running]


def written(folder, suffix=".png"):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}"))


def shards(output):
    """Return the names of the pictures in each shard."""
    return [np.load(path)["files"].tolist() for path in sorted((output / "shards").glob("*.npz"))]
