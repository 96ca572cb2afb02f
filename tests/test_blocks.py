"""Blocks that are written in many ways: a class that attends alone, merged tokens, scaled branches, gates.

In each table, the first way is the plain one, and all others must have its maps.
"""

import pytest
import torch
from torch.nn import functional as F

from tests.blocks import TOKENS, WIDTH, check_like_the_first, ways


def is_class(t):
    return (torch.arange(TOKENS) == 0)[:, None].to(t)


def in_place(net, layer, t):
    found = net.of_class(layer, t)
    t = t.clone()
    t[:, :1] += found
    return t


def into_zeros(net, layer, t):
    out = torch.zeros_like(t)
    out[:, 0] = net.of_class(layer, t)[:, 0]
    return t + out


CLASS_ALONE = {
    "cat": lambda net, n, t: torch.cat([t[:, :1] + net.of_class(n, t), t[:, 1:]], 1),
    "in place": in_place,
    "padded": lambda net, n, t: t + F.pad(net.of_class(n, t), (0, 0, 0, TOKENS - 1)),
    "padded by cat": lambda net, n, t: t + torch.cat([net.of_class(n, t), torch.zeros_like(t[:, 1:])], 1),
    "index_add": lambda net, n, t: t.index_add(1, torch.tensor([0]), net.of_class(n, t)),
    "where": lambda net, n, t: torch.where(is_class(t) > 0, t + net.of_class(n, t), t),
    "masked": lambda net, n, t: t + is_class(t) * net.of_class(n, t),
    "masked, of all": lambda net, n, t: t + is_class(t) * net.branch(n, t),
    "slice_scatter": lambda net, n, t: t.slice_scatter(t[:, :1] + net.of_class(n, t), 1, 0, 1),
    "into zeros": into_zeros,
}


def pairs():
    return torch.kron(torch.eye(8, dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64))


def place_of(p):
    return (torch.arange(16) // 2)[None, :, None].expand(len(p), -1, WIDTH)


def zeros(p):
    return torch.zeros(len(p), 8, WIDTH, dtype=p.dtype)


MERGED = {
    "mean": lambda p: p.unflatten(1, (8, 2)).mean(2),
    "slices": lambda p: (p[:, ::2] + p[:, 1::2]) / 2,
    "matmul": lambda p: pairs() @ p,
    "einsum": lambda p: torch.einsum("mn,bnc->bmc", pairs(), p),
    "avg_pool1d": lambda p: F.avg_pool1d(p.mT, 2).mT,
    "a fixed convolution": lambda p: (
        F.conv1d(p.mT, torch.full((WIDTH, 1, 2), 0.5, dtype=p.dtype), stride=2, groups=WIDTH).mT
    ),
    "index_add": lambda p: zeros(p).index_add(1, torch.arange(16) // 2, p) / 2,
    "scatter_reduce": lambda p: zeros(p).scatter_reduce(1, place_of(p), p, "mean", include_self=False),
    "lerp": lambda p: torch.lerp(p[:, ::2], p[:, 1::2], 0.5),
    "one by one": lambda p: torch.stack([two.mean(1) for two in p.split(2, 1)], 1),
}


def merges(merge):
    def block(net, layer, t):
        t = t + net.branch(layer, t)
        return t if layer else torch.cat([t[:, :1], merge(t[:, 1:])], 1)

    return block


SCALED = {
    "times": lambda t, f, g: t + g * f,
    "addcmul": lambda t, f, g: torch.addcmul(t, f, g),
    "in place": lambda t, f, g: f.mul_(g).add_(t),
    "einsum": lambda t, f, g: t + torch.einsum("bnc,c->bnc", f, g),
    "a diagonal matrix": lambda t, f, g: t + f @ torch.diag(g),
    "less the negative": lambda t, f, g: t - (-g) * f,
    "stack": lambda t, f, g: torch.stack([t, g * f]).sum(0),
    "twice the mean": lambda t, f, g: torch.stack([t, g * f]).mean(0) * 2,
    "twice lerp": lambda t, f, g: 2 * torch.lerp(t, g * f, 0.5),
    "baddbmm": lambda t, f, g: torch.baddbmm(t, f, torch.diag(g).expand(len(t), -1, -1)),
}


def scales(scale):
    def block(net, layer, t):
        t = scale(t, net.branch(layer, t), net.scale)
        return t + net.mlp(t)

    return block


def picture(t):
    return t[:, 1:].mT.unflatten(2, (4, 4))


AROUND = {
    "cat": lambda net, t: torch.cat([t[:, :1], t[:, 1:] + net.around(picture(t)).flatten(2).mT], 1),
    "padded": lambda net, t: t + F.pad(net.around(picture(t)).flatten(2).mT, (0, 0, 1, 0)),
    "as a picture": lambda net, t: torch.cat(
        [t[:, :1], (picture(t) + net.around(picture(t))).flatten(2).mT], 1
    ),
}


def shifted(net, p):
    wide = F.pad(p, (1, 1, 1, 1))
    parts = [(i, j, wide[:, :, i : i + 4, j : j + 4]) for i in range(3) for j in range(3)]
    return sum(net.around.weight[:, 0, i, j, None, None] * part for i, j, part in parts)


def by_unfold(net, p):
    windows = F.unfold(p, 3, padding=1).unflatten(1, (WIDTH, 9))
    return (windows * net.around.weight.view(WIDTH, 9, 1)).sum(2).unflatten(2, (4, 4))


def by_tensor_unfold(net, p):
    windows = F.pad(p, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    return torch.einsum("bchwij,cij->bchw", windows, net.around.weight[:, 0])


DEPTHWISE = {
    "conv2d": lambda net, p: F.conv2d(p, net.around.weight, padding=1, groups=WIDTH),
    "shifted copies": shifted,
    "F.unfold": by_unfold,
    "Tensor.unfold": by_tensor_unfold,
}


def adds_depthwise(convolve):
    def block(net, layer, t):
        t = torch.cat([t[:, :1], (picture(t) + convolve(net, picture(t))).flatten(2).mT], 1)
        return t + net.branch(layer, t)

    return block


def gate_of(net, t):
    return net.out[1](net.norm(t.mean(1, keepdim=True)))


GATED = {
    "times": lambda t, z: t * z.sigmoid(),
    "the gate first": lambda t, z: z.sigmoid().expand_as(t) * t,
    "einsum": lambda t, z: torch.einsum("bnc,bc->bnc", t, z.sigmoid()[:, 0]),
    "channels first": lambda t, z: (t.mT * z.sigmoid().mT).mT,
    "divided": lambda t, z: t / (1 + torch.exp(-z)),
}


def gates(gate):
    """Return a block with the gate of squeeze-and-excitation, arXiv 1709.01507."""
    return lambda net, layer, t: (t := t + net.branch(layer, t)) + net.mlp(gate(t, gate_of(net, t)))


def looks_around(place):
    return lambda net, layer, t: (t := place(net, t)) + net.branch(layer, t)


def chosen_expert(net, t):
    """Return the number of the expert of each token, one of two linear layers, (B, N)."""
    return net.scale.mul(t).sum(-1) > 0


def by_rows(net, t):
    rows, expert = t.flatten(0, 1), chosen_expert(net, t).flatten()
    out = torch.zeros_like(rows)
    for number, layer in enumerate(net.out):
        some = (expert == number).nonzero()[:, 0]
        out.index_add_(0, some, F.gelu(layer(rows[some])))
    return out.view_as(t)


def by_index(net, t):
    out, expert = torch.zeros_like(t), chosen_expert(net, t)
    for number, layer in enumerate(net.out):
        out[expert == number] = F.gelu(layer(t[expert == number]))
    return out


EXPERTS = {
    "masks": lambda net, t: sum(
        F.gelu(layer(t)) * (chosen_expert(net, t) == number)[..., None]
        for number, layer in enumerate(net.out)
    ),
    "index": by_index,
    "index_add_": by_rows,
}


def divides(experts):
    return lambda net, layer, t: (t := t + net.branch(layer, t)) + experts(net, net.norm(t))


TABLES = {
    "a class alone": (CLASS_ALONE, lambda block: block),
    "merged tokens": (MERGED, merges),
    "a scaled branch": (SCALED, scales),
    "experts": (EXPERTS, divides),
    "a convolution of places": (AROUND, looks_around),
    "a depthwise convolution": (DEPTHWISE, adds_depthwise),
    "a gate": (GATED, gates),
}


@pytest.mark.parametrize(("name", "way"), ways(TABLES))
def test_a_block_has_the_same_maps_however_it_is_written(name, way):
    check_like_the_first(way, *TABLES[name])
