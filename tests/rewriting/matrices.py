"""The maps that each function must have, computed from full matrices."""

import functools
from dataclasses import dataclass

import torch

from tests import oracle
from tests.rewriting.activations import cubed
from tests.rewriting.function import BATCH, COUNT, EPS, IMAGE, PATCHES, REAL, SIDE, TARGET, WIDTH
from tests.rewriting.images import blocks
from tests.rewriting.network import weights


@dataclass(frozen=True)
class Expected:
    """The results that every spelling of a function must give.

    Attributes:
        output: the logits.
        maps: keyed by "method" or "method, gradient", (B, SIDE, SIDE); those of evidence are signed.
        seen: attention and its gradient by layer for each network, where a layer is a residual.
        parts: the shares of the score from the image and from constants, in the linearized network.
    """

    output: torch.Tensor
    maps: dict
    seen: dict
    parts: tuple


def some_images():
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3), dtype=REAL)


def held_norm(x, w, b, held):
    x = x - x.mean(-1, keepdim=True)
    size = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x / (size.detach() if held else size) * w + b


def held_gate(h, kind, held):
    gates = {
        "erf": lambda h: (1 + torch.erf(h / 2**0.5)) / 2,
        "tanh": lambda h: (1 + torch.tanh(cubed(h))) / 2,
        "quick": lambda h: torch.sigmoid(1.702 * h),
        "silu": torch.sigmoid,
        "relu": lambda h: (h > 0).to(h),
    }
    if kind != "swiglu":
        gate = gates[kind](h)
        return h * (gate.detach() if held else gate)
    gate, up = h.chunk(2, -1)
    gate = gate * (gate.sigmoid().detach() if held else gate.sigmoid())
    return (gate * up.detach() + gate.detach() * up) / 2 if held else gate * up


class Slow:
    """The function again, with every (token, channel) matrix in full, and with A kept."""

    def __init__(self, function, held):
        self.function, self.held = function, held
        self.weights = {name: value.clone().requires_grad_() for name, value in weights(function).items()}
        self.layers, self.streams = [], []
        self.replaced = None  # A of the last layer, if given

    def pair(self, name):
        return self.weights[name], self.weights[f"{name}_bias"]

    def norm(self, x, place):
        return held_norm(x, *self.pair(f"norm_{place}"), self.held)

    def attention(self, x, place):
        w, b = self.pair(f"qkv_{place}")
        q, k, v = ((self.norm(x, place) @ w.T + b).view(len(x), COUNT, 3, self.function.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if self.held:
            attention = attention.detach().requires_grad_()
        if self.replaced is not None and len(self.layers) == len(self.function.forms):
            attention = self.replaced[len(self.layers[-1])]
        self.layers[-1].append(attention)
        w, b = self.pair(f"out_{place}")
        return torch.einsum("bhij,bjhd->bihd", attention, v).reshape(len(x), COUNT, WIDTH) @ w.T + b

    def mlp(self, x, layer):
        (w, b), (v, c) = self.pair(f"up_{layer}"), self.pair(f"down_{layer}")
        hidden = self.norm(x, f"{layer}m") @ w.T + b
        return held_gate(hidden, self.function.activation, self.held) @ v.T + c

    def __call__(self, images):
        w, b = self.pair("embed")
        x = torch.einsum("bcipjq,dcpq->bijd", blocks(images), w).reshape(len(images), PATCHES, WIDTH) + b
        x = torch.cat([self.weights["first"].expand(len(x), -1, -1), x], 1) + self.weights["place"]
        for layer, form in enumerate(self.function.forms):
            self.layers.append([])
            change = self.attention(x, f"{layer}a")
            if form in ("twins", "all"):
                change = change + self.attention(x, f"{layer}b")
            if form in ("beside", "all"):
                x = x + (change + self.mlp(x, layer))
                self.streams.append(x)
                continue
            x = x + change
            self.streams.append(x)
            x = x + self.mlp(x, layer)
            self.streams.append(x)
        x = self.norm(x, "end")
        w, b = self.pair("head")
        return (x[:, 0] if self.function.read == "token" else x[:, 1:].mean(1)) @ w.T + b


def score(logits):
    return sum(logits[image, index] for image, index in enumerate(TARGET))


def share(map_):
    return map_ / map_.abs().sum(1, keepdim=True)


@functools.cache
@torch.enable_grad()
def expected(function):
    """Compute the maps of a function the slow way."""
    seen, maps = {}, {}
    read = function.read
    for network in ("linearised", "plain"):
        slow, images = Slow(function, network == "linearised"), some_images().requires_grad_()
        logits = slow(images)
        flat = [attention for layer in slow.layers for attention in layer]
        wanted = [*flat, *slow.streams, images, *slow.weights.values()]
        found = torch.autograd.grad(score(logits), wanted, allow_unused=True)
        of = {id(value): gradient for value, gradient in zip(wanted, found, strict=True)}
        attentions = [torch.cat(layer, 1).detach() for layer in slow.layers]
        gradients = [torch.cat([of[id(a)] for a in layer], 1) for layer in slow.layers]
        seen[network] = oracle.Observation(attentions, gradients, None, logits.detach())
        maps[f"grad_rollout, {network}"] = oracle.maps_of(seen[network], "grad_rollout", 1, read)
        maps[f"gae, {network}"] = oracle.gae_maps(seen[network], 1, read)
        if network == "plain":
            maps["rollout"] = oracle.maps_of(seen[network], "rollout", 1, read)
            continue
        rows = slice(0, 1) if read == "token" else slice(1, None)
        pairs = zip(attentions, gradients, strict=True)
        taken = sum((a * g)[:, :, rows].sum((1, 2)) for a, g in pairs)[:, 1:]
        held = sum((x * of[id(x)]).sum(-1).detach() for x in slow.streams)[:, 1:]
        maps["evidence"] = share(taken) + share(held)
        added = [v for name, v in slow.weights.items() if "bias" in name or name in ("first", "place")]
        parts = [(v * of[id(v)]).sum().item() for v in (images, *added) if of[id(v)] is not None]
    maps = {name: found.view(BATCH, SIDE, SIDE) for name, found in maps.items()}
    return Expected(logits.detach(), maps, seen, (parts[0], sum(parts[1:])))
