"""Alternatives to vitx for a timm Vision Transformer, each as a function from model and images.

Each peer is called as in its own README, and imported inside its function, so that a missing or failing one
does not affect the others. Those in `PEERS` leave the model unchanged. Those that explain a class take the
given classes, by default the predicted ones.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import fresh_process
from torch import Tensor, nn
from torch.nn import functional as F

from vitx.attribution.evidence import ranked

Peer = Callable[..., Any]


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Make timm compute the attention matrices, which fused attention hides, inside the context."""
    before = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    try:
        for module in before:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module, value in before.items():
            module.fused_attn = value


def dropouts(model: nn.Module) -> list[nn.Module]:
    """Return the dropout modules that attention matrices pass through, one for each layer."""
    return [module for name, module in model.named_modules() if name.endswith("attn_drop")]


@contextmanager
def attentions(
    model: nn.Module, keep: Callable[[Tensor], Tensor] = lambda attention: attention
) -> Iterator[list[Tensor]]:
    """Collect the result of `keep` on each layer's attention, (B, heads, N, N), inside the context."""
    kept: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: kept.append(keep(output)))
        for module in dropouts(model)
    ]
    try:
        with unfused(model):
            yield kept
    finally:
        for hook in hooks:
            hook.remove()


def roll_out(matrices: Iterable[Tensor]) -> Tensor:
    """Multiply the matrices (B, N, N) of all layers, after adding the identity and normalizing the rows."""
    product = None
    for matrix in matrices:
        step = matrix + torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
        step = step / step.sum(-1, keepdim=True)
        product = step if product is None else step @ product
    assert product is not None, "the model has no attention"
    return product


def patches(model: Any, product: Tensor, read: int = 1) -> Any:
    """Return the mean of the first `read` rows over the patches, (B, h, w): one class token, or two."""
    row = product[:, :read, model.num_prefix_tokens :].mean(1)
    return row.unflatten(1, model.patch_embed.grid_size)


def channels_first(model: Any, tokens: Tensor) -> Any:
    """Reshape patch tokens to the layout of a convolution, (B, N, C) to (B, C, h, w), as glue code."""
    if hasattr(model, "patch_embed"):  # timm's
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, model.patch_embed.grid_size)
    side = int((tokens.shape[1] - 1) ** 0.5)  # others: a square after one class token
    return tokens[:, 1:].mT.unflatten(2, (side, side))


@torch.no_grad()
def dense_rollout(model: nn.Module, images: Tensor, read: int = 1) -> Any:
    """Compute attention rollout as it is usually written."""
    with attentions(model) as kept:
        model(images)
        return patches(model, roll_out(attention.mean(1) for attention in kept), read)


@torch.no_grad()
def hooked_row(model: Any, images: Tensor, read: int = 1) -> Any:
    """Compute attention rollout as a vector that passes through the layers, which no package does."""
    with attentions(model, keep=lambda attention: attention.mean(1)) as kept:
        model(images)
    row = kept[0].new_zeros(len(images), 1, kept[0].shape[-1])
    row[..., :read] = 1 / read
    for attention in reversed(kept):
        row = (row + row @ attention) / 2
    return row[:, 0, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)


def dense_grad_rollout(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """Compute gradient rollout as it is usually written, without gradients of the weights."""
    with attentions(model) as kept:
        logits = model(images)
        scores = logits.amax(1) if classes is None else logits[range(len(images)), list(classes)]
        gradients = torch.autograd.grad(scores.sum(), kept)
        with torch.no_grad():
            pairs = zip(kept, gradients, strict=True)
            return patches(model, roll_out((attention * grad).mean(1).relu() for attention, grad in pairs))


def fast_vit_rollout(model: nn.Module, images: Tensor) -> Any:
    """Call the package fast-vit-rollout, with fused attention off as in its README."""
    from fast_vit_rollout import ViTAttentionRollout

    try:
        with unfused(model):
            return patches(model, ViTAttentionRollout(model, discard_ratio=0.9)(images))
    finally:
        for module in dropouts(model):
            module._forward_hooks.clear()  # it never removes its own


@contextmanager
def without_fallback() -> Iterator[None]:
    """Turn torchxai's warning of a fallback into an error: else, the other method would be measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*[Ff]alling back")
        yield


def torchxai(
    method: str, model: nn.Module, images: Tensor, classes: Sequence[int] | None = None
) -> list[Any]:
    """Call the package torchxai-explain, which takes one image at a time."""
    from torchxai import explain

    asked = [None] * len(images) if classes is None else classes
    with without_fallback():
        return [
            explain(model, image, method=method, target_class=target)
            for image, target in zip(images, asked, strict=True)
        ]


class Logits(nn.Module):
    """A wrapper, as glue code, that returns the logits of Hugging Face models, not their output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits


def last_norm(model: nn.Module) -> nn.Module:
    """Find the layer that the READMEs recommend for a ViT, by its name in each library, as glue code."""
    names = ("norm1", "ln_1", "layernorm_before")
    found: list[nn.Module] = [module for name, module in model.named_modules() if name.endswith(names)]
    return found[-1]


def grad_cam(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """Call Grad-CAM of the package grad-cam (pytorch-grad-cam)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = None if classes is None else [ClassifierOutputTarget(target) for target in classes]
    layers = [last_norm(model)]
    with GradCAM(Logits(model), layers, reshape_transform=partial(channels_first, model)) as cam:
        return cam(input_tensor=images, targets=targets)


def torchcam_grad_cam(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """Call Grad-CAM of the package torchcam, on the same layer."""
    from torchcam.methods import GradCAM

    whole = Logits(model)
    with GradCAM(whole, last_norm(whole), reshape_transform=partial(channels_first, model)) as cam:
        scores = whole(images)
        return cam(scores.argmax(1).tolist() if classes is None else list(classes), scores)[0]


def tidied(peer: Peer) -> Peer:
    """Wrap a peer so that the gradients of the weights that it leaves behind are removed."""

    def explain(model: nn.Module, *arguments: Any) -> Any:
        maps = peer(model, *arguments)
        model.zero_grad()
        return maps

    return explain


def torchcam_legrad(model: Any, images: Tensor) -> Any:
    """Call LeGrad of the package torchcam, its method for Vision Transformers."""
    from torchcam.methods import LeGrad

    def project(tokens: Tensor) -> Any:
        return model.forward_head(model.norm(tokens))

    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    blocks = list(model.blocks)
    with LeGrad(model, blocks, score_projection=project, prefix_tokens=prefix, grid_shape=grid) as cam:
        scores = model(images)
        return cam(scores.argmax(1).tolist())[0]


def torchcam_legrad_twin(model: Any, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """Call LeGrad of torchcam on a torchvision copy of the model, whose layout it supports."""
    from torchcam.methods import LeGrad

    twin = as_torchvision(model)
    with LeGrad(twin, list(twin.encoder.layers)) as cam:
        scores = twin(images)
        return cam(scores.argmax(1).tolist() if classes is None else list(classes))[0]


def as_torchvision(model: Any) -> Any:
    """Return torchvision's VisionTransformer with the weights of a plain timm one, such as DeiT."""
    from torchvision.models import VisionTransformer

    first = model.blocks[0]
    twin = VisionTransformer(
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        num_layers=len(model.blocks),
        num_heads=first.attn.num_heads,
        hidden_dim=model.embed_dim,
        mlp_dim=first.mlp.fc1.out_features,
        num_classes=model.num_classes,
    )
    names = {
        "patch_embed.proj": "conv_proj",
        "norm": "encoder.ln",
        "head": "heads.head",
        **{
            f"blocks.{index}.{ours}": f"encoder.layers.encoder_layer_{index}.{theirs}"
            for index in range(len(model.blocks))
            for ours, theirs in (
                ("norm1", "ln_1"),
                ("norm2", "ln_2"),
                ("attn.proj", "self_attention.out_proj"),
                ("mlp.fc1", "mlp.0"),
                ("mlp.fc2", "mlp.3"),
            )
        },
    }
    state = {"class_token": model.cls_token, "encoder.pos_embedding": model.pos_embed}
    for kind in ("weight", "bias"):
        state |= {f"{theirs}.{kind}": model.get_parameter(f"{ours}.{kind}") for ours, theirs in names.items()}
        for index, block in enumerate(model.blocks):
            key = f"encoder.layers.encoder_layer_{index}.self_attention.in_proj_{kind}"
            state[key] = getattr(block.attn.qkv, kind)
    twin.load_state_dict(state)
    return twin.eval()


def hilrp(model: Any, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Call the package hilrp; evidence against the class is ranked below evidence for it, as in vitx."""
    from uv import find_uv_bin

    # The model is pickled, so the versions of torch and timm must be the same.
    alike = [f"--with={package}=={version(package)}" for package in ("torch", "timm")]
    python = [find_uv_bin(), "run", "--quiet", "--no-project", *alike, "--script"]
    script = Path(__file__).with_name("hilrp_alone.py")
    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.pt", Path(folder) / "answer.pt"
        torch.save((model, images, list(classes), torch.get_num_threads()), question)
        if error := fresh_process(str(script), str(question), str(answer), python=python).get("error"):
            raise RuntimeError(error)
        pixels = torch.load(answer, weights_only=True)
    return ranked(F.adaptive_avg_pool2d(pixels[:, None], model.patch_embed.grid_size)[:, 0])


PEERS: dict[str, Peer] = {
    "dense rollout, hooked": dense_rollout,
    "hooked row": hooked_row,
    "dense gradient rollout, hooked": dense_grad_rollout,
    "fast-vit-rollout": fast_vit_rollout,
    "torchxai-explain, rollout": tidied(partial(torchxai, "rollout")),
    "torchxai-explain, attribution": tidied(partial(torchxai, "attribution")),
    "pytorch-grad-cam, Grad-CAM": tidied(grad_cam),
    "torch-cam, Grad-CAM": torchcam_grad_cam,
    "torch-cam, LeGrad": torchcam_legrad,
}
PACKAGES = ("fast-vit-rollout", "torchxai-explain", "grad-cam", "torchcam")
