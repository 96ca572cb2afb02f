"""Attention that is written in many ways: keys that heads share, rotary positions, biases of the scores.

In each table, the first way is the plain one, and all others must have its maps.
"""

import pytest
import torch
from torch.nn import functional as F

from tests.blocks import HEADS, TOKENS, WIDTH, check_like_the_first, ways, weights


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


TABLES = {
    "keys of two heads": (SHARED_KEYS, attends, 2),
    "keys of one head": (SHARED_KEYS, attends, 1),
    "a convolution of A": (REFINED, refined),
    "rotary positions": (ROTATED, rotates),
    "projected values": (PROJECTED_VALUES, projects_values),
    "a bias of scores": (BIASED, biased),
}


@pytest.mark.parametrize(("name", "way"), ways(TABLES))
def test_attention_has_the_same_maps_however_it_is_written(name, way):
    check_like_the_first(way, *TABLES[name])
