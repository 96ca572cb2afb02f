"""Loggers of one's own, and short trainings that log to some."""

import numpy as np
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

from vitx.callbacks import RolloutCallback

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
FIRINGS = [0, 3, 7]  # the steps of `fit`: before the first step, and after both epochs
TWIN = "pytorch_lightning, the package under its old name, is not installed"


class Bare(Logger):
    """A logger of numbers that implements only what a logger must."""

    name, version = "bare", 0

    def __init__(self):
        super().__init__()
        self.scalars = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.scalars += [(name, step) for name in metrics]

    def steps(self, name):
        return [step for scalar, step in self.scalars if scalar == name]


class Own(Bare):
    """A logger that holds pictures, too."""

    def __init__(self):
        super().__init__()
        self.pictures = []

    def log_image(self, key, images, step):
        if key == "vitx/maps":  # not the overview at the end
            self.pictures += [(key, step, image) for image in images]


def callback(**options):
    return RolloutCallback(num_images=2, **({"on_error": "raise", "save_maps": False} | options))


def steps(points):
    return [point.step for point in points]


def pixels(path):
    return np.asarray(Image.open(path))


def files(folder):
    return sorted(path.name for path in folder.rglob("maps-*.png"))


def numbered(steps):
    return [f"maps-{step:06d}.png" for step in steps]
