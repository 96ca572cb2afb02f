"""What people use on a timm Vision Transformer without vitx, each as a function from model and images.

Each peer is used as its own README does it, and imported in its function, so that one that is missing or
fails does so alone. Those in `PEERS` leave the model as they found it. Those that explain a class take the
predicted one, or the classes that they are given.
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
    """Make timm compute each attention matrix, as fused attention keeps them out of sight."""
    before = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    try:
        for module in before:
            module.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for module, value in before.items():
            module.fused_attn = value


def dropouts(model: nn.Module) -> list[nn.Module]:
    """Return the modules that the attention matrices go through, one for each layer."""
    return [module for name, module in model.named_modules() if name.endswith("attn_drop")]


@contextmanager
def attentions(
    model: nn.Module, keep: Callable[[Tensor], Tensor] = lambda attention: attention
) -> Iterator[list[Tensor]]:
    """Collect what is to be kept of every layer's attention, (B, heads, N, N)."""
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
    """Multiply the matrices (B, N, N) of all layers, the identity added and the rows scaled to sum to 1."""
    product = None
    for matrix in matrices:
        step = matrix + torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
        step = step / step.sum(-1, keepdim=True)
        product = step if product is None else step @ product
    assert product is not None, "the model has no attention"
    return product


def patches(model: Any, product: Tensor, read: int = 1) -> Any:
    """Return what so many tokens at the front read from the patches, (B, h, w): one class token, or two."""
    row = product[:, :read, model.num_prefix_tokens :].mean(1)
    return row.unflatten(1, model.patch_embed.grid_size)


def channels_first(model: Any, tokens: Tensor) -> Any:
    """Glue: lays out the patches' tokens as a convolution would, (B, N, C) to (B, C, h, w)."""
    if hasattr(model, "patch_embed"):  # timm's
        return tokens[:, model.num_prefix_tokens :].mT.unflatten(2, model.patch_embed.grid_size)
    side = int((tokens.shape[1] - 1) ** 0.5)  # others: behind one class token, in a square
    return tokens[:, 1:].mT.unflatten(2, (side, side))


@torch.no_grad()
def dense_rollout(model: nn.Module, images: Tensor, read: int = 1) -> Any:
    """Attention rollout as it is usually written."""
    with attentions(model) as kept:
        model(images)
        return patches(model, roll_out(attention.mean(1) for attention in kept), read)


@torch.no_grad()
def hooked_row(model: Any, images: Tensor, read: int = 1) -> Any:
    """Attention rollout as a vector that goes through the layers, which no package does."""
    with attentions(model, keep=lambda attention: attention.mean(1)) as kept:
        model(images)
    row = kept[0].new_zeros(len(images), 1, kept[0].shape[-1])
    row[..., :read] = 1 / read
    for attention in reversed(kept):
        row = (row + row @ attention) / 2
    return row[:, 0, model.num_prefix_tokens :].unflatten(1, model.patch_embed.grid_size)


def dense_grad_rollout(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """Gradient rollout as it is usually written, without gradients of the weights."""
    with attentions(model) as kept:
        logits = model(images)
        scores = logits.amax(1) if classes is None else logits[range(len(images)), list(classes)]
        gradients = torch.autograd.grad(scores.sum(), kept)
        with torch.no_grad():
            pairs = zip(kept, gradients, strict=True)
            return patches(model, roll_out((attention * grad).mean(1).relu() for attention, grad in pairs))


def fast_vit_rollout(model: nn.Module, images: Tensor) -> Any:
    """The package fast-vit-rollout; its README turns fused attention off."""
    from fast_vit_rollout import ViTAttentionRollout

    try:
        with unfused(model):
            return patches(model, ViTAttentionRollout(model, discard_ratio=0.9)(images))
    finally:
        for module in dropouts(model):
            module._forward_hooks.clear()  # it never removes its own


@contextmanager
def without_fallback() -> Iterator[None]:
    """Let torchxai say that a method fails: it takes another instead, which would be measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*[Ff]alling back")
        yield


def torchxai(
    method: str, model: nn.Module, images: Tensor, classes: Sequence[int] | None = None
) -> list[Any]:
    """The package torchxai-explain, which takes one image at a time."""
    from torchxai import explain

    asked = [None] * len(images) if classes is None else classes
    with without_fallback():
        return [
            explain(model, image, method=method, target_class=target)
            for image, target in zip(images, asked, strict=True)
        ]


class Logits(nn.Module):
    """Glue for Hugging Face's models, whose output is an object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits


def last_norm(model: nn.Module) -> nn.Module:
    """Glue: the layer that the READMEs name for a ViT, by what each library calls it."""
    names = ("norm1", "ln_1", "layernorm_before")
    found: list[nn.Module] = [module for name, module in model.named_modules() if name.endswith(names)]
    return found[-1]


def grad_cam(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """The package grad-cam (pytorch-grad-cam): Grad-CAM."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = None if classes is None else [ClassifierOutputTarget(target) for target in classes]
    layers = [last_norm(model)]
    with GradCAM(Logits(model), layers, reshape_transform=partial(channels_first, model)) as cam:
        return cam(input_tensor=images, targets=targets)


def torchcam_grad_cam(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """The package torchcam: Grad-CAM on the same layer."""
    from torchcam.methods import GradCAM

    whole = Logits(model)
    with GradCAM(whole, last_norm(whole), reshape_transform=partial(channels_first, model)) as cam:
        scores = whole(images)
        return cam(scores.argmax(1).tolist() if classes is None else list(classes), scores)[0]


def tidied(peer: Peer) -> Peer:
    """Make a peer take away the gradients of the weights that it leaves behind."""

    def explain(model: nn.Module, *arguments: Any) -> Any:
        maps = peer(model, *arguments)
        model.zero_grad()
        return maps

    return explain


def torchcam_legrad(model: Any, images: Tensor) -> Any:
    """The package torchcam: LeGrad, its method for Vision Transformers."""
    from torchcam.methods import LeGrad

    def project(tokens: Tensor) -> Any:
        return model.forward_head(model.norm(tokens))

    prefix, grid = model.num_prefix_tokens, model.patch_embed.grid_size
    blocks = list(model.blocks)
    with LeGrad(model, blocks, score_projection=project, prefix_tokens=prefix, grid_shape=grid) as cam:
        scores = model(images)
        return cam(scores.argmax(1).tolist())[0]


def torchcam_legrad_twin(model: Any, images: Tensor, classes: Sequence[int] | None = None) -> Any:
    """The same, on the model as torchvision would have it, which it knows."""
    from torchcam.methods import LeGrad

    twin = as_torchvision(model)
    with LeGrad(twin, list(twin.encoder.layers)) as cam:
        scores = twin(images)
        return cam(scores.argmax(1).tolist() if classes is None else list(classes))[0]


def as_torchvision(model: Any) -> Any:
    """Return torchvision's VisionTransformer with the weights of timm's plain one, as DeiT is."""
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
    """The package hilrp; what speaks against the class is ranked below what speaks for it, as in vitx."""
    from uv import find_uv_bin

    # The model is handed over, which asks for the same versions of what made it.
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
