"""Published methods on linearized networks, reimplemented as baselines for timm's plain ViT.

- LibraGrad (Mehri et al., CVPR 2025, arXiv 2411.16760): attention, the scale of norms and the gate of
  activations are held constant. The map is input x gradient of the patch tokens, or its sum over the inputs
  of all blocks and of the final norm ("IxG-PLUS").
- AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) without its gamma rule: the softmax keeps its gradient, and
  a product of two activations passes half of the gradient to each.

Evidence against the class is ranked below all evidence for it, as in `vitx.attribution.evidence`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitx.attribution.evidence import ranked


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply a layer norm whose scale is held constant."""
    variance = x.var(-1, keepdim=True, unbiased=False).detach()
    scaled: Tensor = (x - x.mean(-1, keepdim=True)) / (variance + layer.eps).sqrt()
    return scaled * layer.weight + layer.bias


def gelu(x: Tensor) -> Tensor:
    """Apply a GELU whose gate is held constant."""
    gate = torch.where(x == 0, 0.5, F.gelu(x) / torch.where(x == 0, 1, x))
    return x * gate.detach()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product that passes half of its gradient to each factor."""
    return (a.detach() @ b + a @ b.detach()) / 2


def attend(layer: Any, x: Tensor, fixed: bool) -> Tensor:
    """Apply timm's attention with A held constant if `fixed`, else with halved gradients of products."""
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT if fixed else product(q, k.mT)
    attention = (logits * layer.scale).softmax(-1)
    out = attention.detach() @ v if fixed else product(attention, v)
    projected: Tensor = layer.proj(out.transpose(1, 2).flatten(2))
    return projected


def follow(model: Any, images: Tensor, fixed: bool) -> tuple[list[Tensor], Tensor]:
    """Return the tokens before each block and before the final norm, (B, N, C), and the logits."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    tokens = [x]
    for block in model.blocks:
        x = x + attend(block.attn, norm(block.norm1, x), fixed)
        x = x + block.mlp.fc2(gelu(block.mlp.fc1(norm(block.norm2, x))))
        tokens.append(x)
    return tokens, model.forward_head(norm(model.norm, x))


def contributions(model: Any, images: Tensor, classes: Sequence[int], fixed: bool, blocks: slice) -> Tensor:
    """Return input x gradient of the patch tokens, summed over the inputs of some blocks, (B, h, w)."""
    with torch.enable_grad():
        tokens, logits = follow(model, images, fixed)
        score = logits[range(len(images)), list(classes)].sum()
        chosen = tokens[blocks]
        gradients = torch.autograd.grad(score, chosen)
    parts = [(x.detach() * gradient).sum(-1) for x, gradient in zip(chosen, gradients, strict=True)]
    signed = torch.stack(parts).sum(0)[:, model.num_prefix_tokens :]
    return ranked(signed.unflatten(1, model.patch_embed.grid_size))


def libragrad(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Return LibraGrad's input x gradient."""
    return contributions(model, images, classes, True, slice(1))


def libragrad_plus(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Return LibraGrad's IxG-PLUS."""
    return contributions(model, images, classes, True, slice(None))


def attn_lrp(model: nn.Module, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Return AttnLRP's input x gradient."""
    return contributions(model, images, classes, False, slice(1))
