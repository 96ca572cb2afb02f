"""A slow, straightforward implementation of the formulas, which shares no code with vitx.

It turns off fused attention, captures A as the softmax computes it, takes gradients by autograd on A itself,
and multiplies full N x N matrices, one image at a time.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from tests.visible import Linearized, softmaxes, visible_twin


@dataclass(frozen=True)
class Observation:
    """The results of one forward and backward pass.

    Attributes:
        attentions: A of each layer, (B, H, N, N), first layer first.
        gradients: d score / dA of each layer.
        pooling: attention that pools the tokens, (B, H, N), or None.
        logits: the output of the model.
    """

    attentions: list
    gradients: list
    pooling: torch.Tensor | None
    logits: torch.Tensor


def oracle_maps(model, images, method, target, prefix, readout, fusion="mean", discard=0.0, start_layer=0):
    """Return the relevance of each patch, (B, patches), in float64."""
    return maps_of(observe(model, images, target), method, prefix, readout, fusion, discard, start_layer)


def maps_of(seen, method, prefix, readout, fusion="mean", discard=0.0, start_layer=0):
    """Return the relevance of each patch from attention that was already observed."""
    rows = []
    for image in range(len(seen.logits)):
        matrices = []
        for attention, gradient in zip(seen.attentions, seen.gradients, strict=True):
            if method == "rollout":
                matrix = fuse(attention[image].double(), fusion)
            else:
                matrix = fuse(attention[image].double() * gradient[image].double(), fusion).clamp(min=0)
            matrices.append(drop_smallest(matrix, discard))
        product = rollout(matrices[start_layer:])
        weights = readout_weights(readout, prefix, len(product), seen.pooling, image, fusion)
        rows.append((weights / weights.sum() @ product)[prefix:])
    return torch.stack(rows)


def evidence_signed(model, images, target, prefix, readout, start_layer=0):
    """Return evidence for timm: that of residuals plus that of read tokens, each over its absolute sum."""
    twin, streams = visible_twin(model), []
    for block in twin.blocks:
        block.norm2.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
        block.register_forward_hook(lambda _, inputs, output: streams.append(output))
    with torch.enable_grad(), softmaxes(constant=True) as found, Linearized():
        logits = twin(images)
    square = [a for a in found if a.shape[-1] == a.shape[-2]]
    gradients = torch.autograd.grad(_score(logits, target), [*square, *streams], allow_unused=True)
    count = square[0].shape[-1]
    read = {"token": [0], "distilled": [0, 1], "patches": range(prefix, count)}.get(readout, range(count))
    taken, held = torch.zeros(2, len(logits), count, dtype=torch.float64)
    for attention, gradient in list(zip(square, gradients, strict=False))[start_layer:]:
        for query in read:
            taken += (attention[:, :, query] * gradient[:, :, query]).sum(1).detach()
    pairs = list(zip(streams, gradients[len(square) :], strict=True))[2 * start_layer :]
    for stream, gradient in pairs:
        if gradient is not None:
            held += (stream * gradient).sum(-1).detach()
    taken, held = taken[:, prefix:], held[:, prefix:]
    return taken / taken.abs().sum(1, keepdim=True) + held / held.abs().sum(1, keepdim=True)


def gae_maps(seen, prefix, readout, start_layer=0):
    """Apply Chefer's rule as in the paper: R starts as I, and each layer adds its matrix times R."""
    rows = []
    for image in range(len(seen.logits)):
        count = seen.attentions[0].shape[-1]
        relevance = torch.eye(count, dtype=torch.float64)
        for attention, gradient in list(zip(seen.attentions, seen.gradients, strict=True))[start_layer:]:
            positive = (attention[image].double() * gradient[image].double()).clamp(min=0)
            relevance = relevance + positive.mean(0) @ relevance
        weights = readout_weights(readout, prefix, count, seen.pooling, image)
        rows.append((weights @ relevance)[prefix:])
    return torch.stack(rows)


def attention_maps(seen, prefix, readout, fusion="mean"):
    """Propagate the readout weights through the last layer's attention."""
    rows = []
    for image in range(len(seen.logits)):
        fused = fuse(seen.attentions[-1][image].double(), fusion)
        weights = readout_weights(readout, prefix, len(fused), seen.pooling, image, fusion)
        rows.append((weights / weights.sum() @ fused)[prefix:])
    return torch.stack(rows)


def legrad_maps(model, images, target, prefix, start_layer=0, network="linearised"):
    """Compute LeGrad for a timm model, with the gradient of each block's own score taken on A itself."""
    held = network == "linearised"
    twin, tokens = visible_twin(model), []
    handles = [
        block.register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
        for block in twin.blocks
    ]
    with torch.enable_grad(), softmaxes(constant=held) as found, Linearized() if held else nullcontext():
        logits = twin(images)
    for handle in handles:
        handle.remove()
    square = [a for a in found if a.shape[-1] == a.shape[-2]]
    if target is None:
        target = logits.argmax(1).tolist()
    total = 0
    for attention, output in list(zip(square, tokens, strict=True))[start_layer:]:
        with torch.enable_grad(), Linearized() if held else nullcontext():
            score = _score(own_logits(twin, output), target)
        gradient = torch.autograd.grad(score, attention, retain_graph=True)[0]
        total = total + gradient.clamp(min=0).mean((1, 2))[:, prefix:]
    return total.double() / (len(square) - start_layer)


def own_logits(model, tokens):
    """Apply the head of a timm model to the mean of the tokens."""
    mean = model.norm(tokens.mean(1))
    if getattr(model, "attn_pool", None) is not None:
        mean = model.attn_pool(mean[:, None])
    mean = model.fc_norm(mean) if hasattr(model, "fc_norm") else mean
    if hasattr(model, "head_dist"):
        return (model.head(mean) + model.head_dist(mean)) / 2
    return model.head(mean)


def fuse(heads, fusion):
    if fusion == "mean":
        return heads.sum(0) / len(heads)
    return heads.max(0).values if fusion == "max" else heads.min(0).values


def drop_smallest(matrix, ratio):
    """Set the floor(ratio N N) smallest entries to 0, the first of equal ones first; keep entry (0, 0)."""
    flat = matrix.flatten().clone()
    dropped = torch.sort(flat, stable=True).indices[: math.floor(ratio * len(flat))]
    flat[dropped[dropped != 0]] = 0
    return flat.view_as(matrix)


def rollout(matrices):
    """Return rownorm(W_L + I) ... rownorm(W_1 + I)."""
    identity = torch.eye(len(matrices[0]), dtype=torch.float64)
    product = identity
    for matrix in matrices:
        mixed = matrix + identity
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    return product


def readout_weights(kind, prefix, count, pooling=None, image=0, fusion="mean"):
    weights = torch.zeros(count, dtype=torch.float64)
    patches = count - prefix
    if kind == "token":
        weights[0] = 1
    elif kind == "distilled":
        weights[0] = weights[1] = 0.5
    elif kind == "patches":
        weights[prefix:] = 1 / patches
    elif kind == "all":
        weights[:] = 1 / count
    elif kind == "token+patches":
        weights[0] = 0.5
        weights[prefix:] = 0.5 / patches
    else:
        assert kind == "attention"
        weights[:] = fuse(pooling[image].double(), fusion)
    return weights


def observe(model, images, target=None, network="linearised"):
    """Run a copy of the model in which every attention is a softmax that can be observed."""
    twin = visible_twin(model)
    held = network == "linearised"
    with torch.enable_grad(), softmaxes(constant=held) as found, Linearized() if held else nullcontext():
        output = twin(images)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    square = [a for a in found if a.shape[-1] == a.shape[-2]]
    pooling = [a for a in found if a.shape[-2] == 1]
    gradients = torch.autograd.grad(_score(logits, target), square)
    return Observation(
        [a.detach() for a in square],
        list(gradients),
        pooling[0][:, :, 0].detach() if pooling else None,
        logits.detach(),
    )


def _score(logits, target):
    if callable(target):
        return target(logits).sum()
    if target is None:
        target = logits.argmax(1).tolist()
    if isinstance(target, int):
        target = [target] * len(logits)
    return sum(logits[image, index] for image, index in enumerate(target))


def relative_error(maps, wanted):
    """Return the largest error relative to each map's own maximum."""
    maps = maps.double().flatten(1)
    return ((maps - wanted).abs().amax(1) / wanted.amax(1)).max().item()


def same(first, second, tolerance=1e-5):
    """Return True if two explanations have the same maps."""
    return relative_error(first.maps, second.maps.double().flatten(1)) < tolerance


def close(found, wanted, tolerance=1e-9):
    """Return True if two lists of tensors are the same."""
    return len(found) == len(wanted) and all(
        a.shape == b.shape and (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(found, wanted, strict=True)
    )
