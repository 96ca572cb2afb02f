"""Baselines that point at the digit without having learned it: `python -m demo.baselines`."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import vitx
from demo.digits import DigitScenes, unnormalized
from vitx import metrics
from vitx.models.checkpoints import create_model

PATCH = 8
_SEEDS = range(3)


def baselines() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name, maps (B, 8, 8) and masks of the boxes for each baseline on the validation scenes."""
    data = DigitScenes()
    data.setup("fit")
    images, _, boxes = data.validation[0].tensors
    pixels = unnormalized(images)
    yield "brightness", F.avg_pool2d(pixels.mean(1), PATCH), boxes
    yield "colorfulness", F.avg_pool2d(pixels.amax(1) - pixels.amin(1), PATCH), boxes
    center = torch.zeros(len(images), 8, 8)
    center[:, 3:5, 3:5] = 1
    yield "center", center, boxes
    for seed in _SEEDS:
        torch.manual_seed(seed)
        options = {"img_size": 64, "patch_size": PATCH, "depth": 4}
        model = create_model("deit_tiny_patch16_224", False, 10, options)
        for method in ("rollout", "grad_rollout"):
            maps = torch.cat([vitx.explain(model, part, method).maps for part in images.split(50)])
            yield f"{method}, untrained network {seed}", maps, boxes


def main() -> None:
    """Print the table."""
    print(f"{'':38}pointing  energy")
    for number, (name, maps, boxes) in enumerate(baselines()):
        if number == 0:
            share = boxes.float().mean()
            print(f"{'chance: share of the box':38}{share:8.3f}{share:8.3f}")
        pointing, energy = (
            metrics.pointing_game(maps, boxes).mean(),
            metrics.energy_inside(maps, boxes).mean(),
        )
        print(f"{name:38}{pointing:8.3f}{energy:8.3f}")


if __name__ == "__main__":
    main()
