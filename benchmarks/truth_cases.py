"""The contenders whose maps are judged, each a function from model, images and classes to maps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import peers
import propagation
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitx

Contender = Callable[[nn.Module, Tensor, Sequence[int]], Any]


def explained(
    method: str, options: dict[str, Any], model: nn.Module, images: Tensor, classes: Sequence[int]
) -> Tensor:
    """Return the maps of a method of vitx."""
    return vitx.explain(model, images, method, target=classes, **options).maps


def without_class(peer: Callable[..., Any], model: nn.Module, images: Tensor, _: Sequence[int]) -> Any:
    """Return the maps of a peer that explains no class."""
    return peer(model, images)


def mirrored(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the mean of the maps of each image and of its mirror image."""
    both = [explained("evidence", {}, model, each, classes) for each in (images, images.flip(3))]
    return (both[0] + both[1].flip(2)) / 2


def drawn(model: Any, images: Tensor, _: Sequence[int]) -> Tensor:
    """Return maps of noise, a baseline for what is right by chance."""
    generator = torch.Generator().manual_seed(int(images[0].double().abs().sum()))
    return torch.rand(len(images), *model.patch_embed.grid_size, generator=generator)


def center(model: Any, images: Tensor, _: Sequence[int]) -> Tensor:
    """Return a blob in the center for any image, as objects in photographs are often there."""
    rows, columns = (torch.linspace(-1, 1, count) for count in model.patch_embed.grid_size)
    return torch.exp(-2 * (rows[:, None] ** 2 + columns**2)).expand(len(images), -1, -1)


def as_maps(found: Any) -> Tensor:
    """Convert the result of a contender, a tensor or a list of arrays, to maps (B, h, w)."""
    maps = found if isinstance(found, Tensor) else torch.from_numpy(np.stack(found))
    return maps.detach().float()


def on_grid(maps: Tensor, model: Any) -> Tensor:
    """Pool maps to the grid of the model's patches."""
    return F.adaptive_avg_pool2d(maps[:, None], model.patch_embed.grid_size)[:, 0]


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "vitx grad_rollout": ("grad_rollout", {}),
    "vitx evidence": ("evidence", {}),
    "vitx rollout": ("rollout", {}),
    "vitx gae": ("gae", {}),
    "vitx attention": ("attention", {}),
    "vitx legrad": ("legrad", {}),
    "vitx flow": ("flow", {}),
    "vitx evidence, layers 7 to 12": ("evidence", {"start_layer": 6}),
    "vitx grad_rollout, plain gradient": ("grad_rollout", {"gradient": "plain"}),
    "vitx gae, plain gradient": ("gae", {"gradient": "plain"}),
    "vitx legrad, plain gradient": ("legrad", {"gradient": "plain"}),
    "vitx grad_rollout, layers 7 to 12": ("grad_rollout", {"start_layer": 6}),
    "vitx grad_rollout, discard 0.9": ("grad_rollout", {"discard_ratio": 0.9}),
    "vitx rollout, max, discard 0.9": ("rollout", {"head_fusion": "max", "discard_ratio": 0.9}),
    "vitx rollout, min": ("rollout", {"head_fusion": "min"}),
}
REFERENCE = "vitx grad_rollout"
CONTENDERS: dict[str, Contender] = {
    **{name: partial(explained, *asked) for name, asked in METHODS.items()},
    "fast-vit-rollout": partial(without_class, peers.fast_vit_rollout),
    "torchxai-explain, rollout": partial(without_class, peers.PEERS["torchxai-explain, rollout"]),
    "torchxai-explain, attribution": peers.PEERS["torchxai-explain, attribution"],
    "pytorch-grad-cam, Grad-CAM": peers.PEERS["pytorch-grad-cam, Grad-CAM"],
    "torch-cam, Grad-CAM": peers.torchcam_grad_cam,
    "torch-cam, LeGrad": peers.torchcam_legrad_twin,
    "hilrp": peers.hilrp,
    "LibraGrad, input x gradient": propagation.libragrad,
    "LibraGrad, IxG-PLUS": propagation.libragrad_plus,
    "AttnLRP, no gamma rule": propagation.attn_lrp,
    "a blob in the center": center,
    "noise": drawn,
    "vitx evidence, with its mirror image": mirrored,
}
