"""Blocks that are written in many ways: keys that heads share, a class that attends alone, merged tokens.

In each table, the first way is the plain one, and all others must have its maps.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

from tests.blocks import HEADS, TOKENS, WIDTH, check_alike, explained, weights


def attends(attend):
    """Return a block whose heads are `attend(q, k, v)`, (B, heads, N, d)."""

    def block(net, layer, t):
        out = attend(*net.projected(layer, t)).transpose(1, 2).flatten(2)
        t = t + net.out[layer](out)
        return t + net.mlp(t)

    return block


def einsums(q, k, v):
    q = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrid,bgjd->bgrij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bgrij,bgjd->bgrid", scores.softmax(-1), v).flatten(1, 2)


def in_rows(attend):
    """Return attention in which heads that share keys are further rows."""

    def attended(q, k, v):
        rows = q.unflatten(1, (k.shape[1], -1))
        return attend(rows.flatten(2, 3), k, v).view_as(rows).flatten(1, 2)

    return attended


def in_rows_last(q, k, v):
    rows = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)
    return (
        F.scaled_dot_product_attention(rows.flatten(2, 3), k, v).view_as(rows).transpose(2, 3).flatten(1, 2)
    )


def repeated(attend):
    return lambda q, k, v: attend(q, *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)))


def plain(q, k, v):
    return weights(q, k) @ v


SHARED_KEYS = {
    "repeated": repeated(plain),
    "repeated, fused": repeated(F.scaled_dot_product_attention),
    "broadcast": lambda q, k, v: (
        weights(q.unflatten(1, (k.shape[1], -1)), k[:, :, None]) @ v[:, :, None]
    ).flatten(1, 2),
    "head by head": lambda q, k, v: torch.cat(
        [plain(q[:, [h]], *(x[:, [h * x.shape[1] // HEADS]] for x in (k, v))) for h in range(HEADS)], 1
    ),
    "einsum": einsums,
    "in rows": in_rows(plain),
    "in rows, fused": in_rows(F.scaled_dot_product_attention),
    "in rows, tokens first": in_rows_last,
}


def by_shifts(a, kernel):
    pads = F.pad(a, (1, 1, 1, 1))
    parts = [(i, j, pads[:, :, i : i + TOKENS, j : j + TOKENS]) for i in range(3) for j in range(3)]
    return sum(kernel[:, 0, i, j, None, None] * part for i, j, part in parts)


def refined(refine):
    """Return a block whose A is convolved, as in Refiner (arXiv 2106.03714)."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        a = refine(weights(q, k), net.around.weight[:HEADS])
        return t + net.out[layer]((a @ v).transpose(1, 2).flatten(2))

    return block


REFINED = {
    "shifts": by_shifts,
    "conv2d": lambda a, kernel: F.conv2d(a, kernel, padding=1, groups=HEADS),
}


def turned(x):
    """Rotate pairs of channels by the position of their token, with real numbers."""
    (a, b), (cos, sin) = x.unflatten(-1, (-1, 2)).unbind(-1), (angles().cos(), angles().sin())
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def angles():
    return torch.arange(TOKENS)[:, None] / 2.0 ** torch.arange(WIDTH // 2, dtype=torch.float64)


def turned_as_complex(x):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles()), angles())).flatten(-2)


def turned_in_parts(x):
    pairs = torch.complex(x[..., ::2].contiguous(), x[..., 1::2].contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angles()), angles())
    return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)


def rotates(turn):
    """Return a block of one head whose queries and keys have rotary positions."""

    def block(net, layer, t):
        q, k, v = (one[layer](net.norm(t)) for one in (net.q, net.k, net.v))
        return t + net.out[layer](weights(turn(q), turn(k)) @ v)

    return block


ROTATED = {"real": turned, "view_as_complex": turned_as_complex, "complex": turned_in_parts}


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


def side_by_side(a, v):
    return a.transpose(1, 2).flatten(2) @ v.flatten(1, 2)


PROJECTED_VALUES = {
    "A v, projected": None,
    "summed over heads": lambda a, v: (a @ v).sum(1),
    "heads and keys contracted at once": lambda a, v: torch.einsum("bhij,bhjc->bic", a, v),
    "heads side by side": side_by_side,
    "a linear layer for each image": lambda a, v: torch.stack(
        [F.linear(one, w.mT) for one, w in zip(a.transpose(1, 2).flatten(2), v.flatten(1, 2), strict=True)]
    ),
}


def projects_values(mix):
    """Return a block that projects the values of each head before A mixes them."""

    def block(net, layer, t):
        if mix is None:
            return t + net.branch(layer, t)
        q, k, v = net.projected(layer, t)
        out = net.out[layer]
        heads = out.weight.unflatten(1, (HEADS, -1)).permute(1, 2, 0)
        return t + (mix(weights(q, k), v @ heads) + out.bias)

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


def over_its_sum(e):
    return e / e.sum(-1, keepdim=True)


BIASED = {
    "added": lambda s, bias: (s + bias).softmax(-1),
    "more channels of queries and keys": None,
    "a factor of the exponentials": lambda s, bias: over_its_sum(s.exp() * bias.exp()),
    "a factor of the weights": lambda s, bias: over_its_sum(s.softmax(-1) * bias.exp()),
}


def biased(attend):
    """Return a block whose scores have a learned bias."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        bias = net.place[0] @ net.place[0].mT
        if attend is None:
            q, k = q / q.shape[-1] ** 0.5, k
            q = torch.cat([q, bias.expand(*q.shape[:2], -1, -1)], -1)
            k = torch.cat([k, torch.eye(TOKENS, dtype=t.dtype).expand(*k.shape[:2], -1, -1)], -1)
            a = (q @ k.mT).softmax(-1)
        else:
            a = attend(q @ k.mT / q.shape[-1] ** 0.5, bias)
        return t + net.out[layer]((a @ v).transpose(1, 2).flatten(2))

    return block


def looks_around(place):
    return lambda net, layer, t: (t := place(net, t)) + net.branch(layer, t)


TABLES = {
    "keys of two heads": (SHARED_KEYS, attends, 2),
    "keys of one head": (SHARED_KEYS, attends, 1),
    "a convolution of A": (REFINED, refined, HEADS),
    "rotary positions": (ROTATED, rotates, HEADS),
    "a class alone": (CLASS_ALONE, lambda block: block, HEADS),
    "merged tokens": (MERGED, merges, HEADS),
    "a scaled branch": (SCALED, scales, HEADS),
    "a convolution of places": (AROUND, looks_around, HEADS),
    "a depthwise convolution": (DEPTHWISE, adds_depthwise, HEADS),
    "projected values": (PROJECTED_VALUES, projects_values, HEADS),
    "a gate": (GATED, gates, HEADS),
    "a bias of scores": (BIASED, biased, HEADS),
}
WAYS = [(name, way) for name, (table, _, _) in TABLES.items() for way in [*table][1:]]


@functools.cache
def plainly(name):
    table, make, shared = TABLES[name]
    return explained(make(next(iter(table.values()))), shared)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_block_has_the_same_maps_however_it_is_written(name, way):
    table, make, shared = TABLES[name]
    check_alike(explained(make(table[way]), shared), plainly(name))
