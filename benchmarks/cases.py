"""The contenders whose cost is measured, and the models and images for it."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from peers import PEERS, Peer
from torch import Tensor, nn

import vitx


def forward(model: nn.Module, images: Tensor) -> Any:
    """Run a forward pass, the baseline."""
    with torch.no_grad():
        return model(images)


def kept(model: nn.Module, images: Tensor) -> Any:
    """Run a forward pass in which autograd keeps what a backward pass would need."""
    return model(images)


def backward(model: nn.Module, images: Tensor) -> Any:
    """Run forward and backward, the least cost of anything with gradients. The weights get none."""
    pixels = images.clone().requires_grad_()
    return torch.autograd.grad(model(pixels).amax(1).sum(), pixels)


def explained(method: str, options: dict[str, Any], model: nn.Module, images: Tensor) -> Any:
    """Explain by a method of vitx."""
    return vitx.explain(model, images, method, **options)


def explain_by(explain: Peer, method: str, model: nn.Module, images: Tensor) -> Any:
    """Explain by another version of vitx."""
    return explain(model, images, method)


ROLLOUTS = ("rollout", "grad_rollout")
METHODS = (*ROLLOUTS, "evidence")
OPTIONS: tuple[dict[str, Any], ...] = ({"head_fusion": "max"}, {"head_fusion": "min"}, {"discard_ratio": 0.9})
FORWARD, KEPT, BACKWARD = "forward", "forward, kept by autograd", "forward + backward to the pixels"
VITX: dict[str, Peer] = {f"vitx {method}": partial(explained, method, {}) for method in METHODS}
VARIANTS: dict[str, Peer] = {
    f"vitx {method}, {key} {value}": partial(explained, method, options)
    for method in ROLLOUTS
    for options in OPTIONS
    for key, value in options.items()
}
TIMED: dict[str, Peer] = {**VITX, BACKWARD: backward, **PEERS}
RUNS: dict[str, Peer] = {FORWARD: forward, KEPT: kept, **TIMED, **VARIANTS}
CLOSE = {FORWARD, KEPT, BACKWARD, *VITX}  # similar in memory; peers need several times as much
WITHOUT_CLASS = {
    *("vitx rollout", "dense rollout, hooked", "hooked row", "fast-vit-rollout", "torchxai-explain, rollout")
}
FOR_A_CLASS = set(TIMED) - WITHOUT_CLASS


@dataclass(frozen=True)
class Case:
    """A model and images.

    Attributes:
        model: its name in timm.
        batch: the number of images.
        size: their height and width.
        options: options of the model.
        dtype: the type of weights and images.
        variants: whether vitx is also measured with its options.
        memory: whether memory is also measured.
        every: the number by which rounds are divided, as each takes longer.
        sized: whether the model is built for one size of images.
    """

    model: str
    batch: int
    size: int
    options: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"
    variants: bool = False
    memory: bool = False
    every: int = 1
    sized: bool = True

    @property
    def title(self) -> str:
        """The heading of this case."""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.model}, {self.batch} × {self.size} px{dtype}"

    def build(self, device: str) -> tuple[nn.Module, Tensor]:
        """Return the model and the images."""
        torch.manual_seed(0)
        dtype: torch.dtype = getattr(torch, self.dtype)
        sized = {"img_size": self.size} if self.sized else {}
        model = timm.create_model(self.model, **sized, **self.options)
        images = torch.randn(self.batch, 3, self.size, self.size, device=device, dtype=dtype)
        return model.eval().to(device, dtype), images


TINY = "deit_tiny_patch16_224"
CPU_CASES = {
    "tiny-224": Case(TINY, 8, 224, variants=True),
    "tiny-1024": Case(TINY, 1, 1024, memory=True, every=3),
    "tiny-512": Case(TINY, 1, 512, memory=True),
    "small-224": Case("vit_small_patch16_224", 4, 224, every=2),
    "small-384": Case("vit_small_patch16_224", 2, 384, every=2),
    "distilled-224": Case("deit_tiny_distilled_patch16_224", 8, 224),
    "swin-224": Case("swin_tiny_patch4_window7_224", 8, 224, every=3),
    "pvt-224": Case("pvt_v2_b0", 8, 224, every=3, sized=False),
    "tiny-768": Case(TINY, 1, 768, every=2),
    "dinov2-224": Case("vit_small_patch14_reg4_dinov2", 4, 224, {"num_classes": 10}),
}
CUDA_CASES = {
    f"{model}-{size}-{dtype}": Case(
        f"{model}_patch16_224", 8 if size == 224 else 1, size, {}, dtype, variants=size == 224, memory=True
    )
    for model in ("deit_tiny", "vit_small", "vit_base", "vit_large")
    for size in (224, 512, 1024, 2048)
    for dtype in ("float32", "bfloat16")
}
PLOTTED = {"cpu": ("tiny-224", "tiny-512"), "cuda": ("vit_base-224-bfloat16", "vit_base-1024-bfloat16")}
QUICK = {
    "cpu": ("tiny-224", "tiny-512", "import"),
    "cuda": ("deit_tiny-224-float32", "deit_tiny-512-float32"),
}
LARGE = Case("vit_base_patch16_224", 1, 2048)
DEPTHS = (12, 24, 48)
