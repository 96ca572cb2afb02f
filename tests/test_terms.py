"""Terms of sums that are written in other ways: joined before one projection, stacked, or broadcast.

In each table, the first way is the plain one, and all others must have its maps.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks import HEADS, TOKENS, check_alike, check_like_the_first, explained, ways, weights
from vitx import VitxError

SIZES = (2, 3, 1, 6)  # of heads of unequal width


def parallel(project):
    """Return a block of an attention beside an MLP; `project` takes both, with two weights and a bias."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        attended = (weights(q, k) @ v).transpose(1, 2).flatten(2)
        *hidden, last = net.mlp
        out = net.out[layer]
        return t + project(attended, nn.Sequential(*hidden)(t), out.weight, last.weight, out.bias + last.bias)

    return block


BESIDE_MLP = {
    "two projections": lambda a, m, w, u, b: F.linear(a, w) + F.linear(m, u, b),
    "one projection": lambda a, m, w, u, b: F.linear(torch.cat([a, m], -1), torch.cat([w, u], 1), b),
    "one projection, MLP first": lambda a, m, w, u, b: F.linear(
        torch.cat([m, a], -1), torch.cat([u, w], 1), b
    ),
    "one projection of a copy": lambda a, m, w, u, b: F.linear(
        torch.cat([a, m], -1).clone(), torch.cat([w, u], 1), b
    ),
    "one projection of rows": lambda a, m, w, u, b: F.linear(
        torch.cat([a, m], -1).flatten(0, 1), torch.cat([w, u], 1), b
    ).view_as(a),
    "matmul": lambda a, m, w, u, b: torch.cat([a, m], -1) @ torch.cat([w, u], 1).mT + b,
    "bmm": lambda a, m, w, u, b: (
        torch.bmm(torch.cat([a, m], -1), torch.cat([w, u], 1).mT.expand(len(a), -1, -1)) + b
    ),
}


def unequal(project):
    """Return a block whose heads have values of unequal width, which `project` takes to the channels."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        values = v.transpose(1, 2).flatten(2).split(SIZES, -1)
        heads = [weights(q[:, n], k[:, n]) @ values[n] for n in range(HEADS)]
        return t + project(heads, net.out[layer].weight)

    return block


UNEQUAL_HEADS = {
    "added": lambda heads, w: sum(map(F.linear, heads, w.split(SIZES, 1))),
    "cat": lambda heads, w: F.linear(torch.cat(heads, -1), w),
    "cat, matmul": lambda heads, w: torch.cat(heads, -1) @ w.T,
}


def weighted(add):
    """Return a block whose residual has learned weights; `add` takes the stream, the branch and these."""
    return lambda net, layer, t: add(t, net.branch(layer, t), net.scale[:2])


LEARNED_RESIDUAL = {
    "times": lambda t, f, w: w[0] * t + w[1] * f,
    "stack of products": lambda t, f, w: torch.stack([w[0] * t, w[1] * f]).sum(0),
    "product of a stack": lambda t, f, w: (w[:, None, None, None] * torch.stack([t, f])).sum(0),
    "product of a stack of channels": lambda t, f, w: (torch.stack([t, f], -1) * w).sum(-1),
}


def read_by(read):
    """Return a block that attends, and at the end is only read: `read` returns (B, N, C)."""

    def block(net, layer, t):
        t = t + net.branch(layer, t)
        return t if layer == 0 else read(net, t)

    return block


def class_and_pool(read):
    def of_both(net, t):
        patches = t[:, 1:]
        pool = (net.norm(patches)[..., :1].mul(5).softmax(1) * patches).sum(1, keepdim=True)
        return read(t[:, :1], pool, *(one.weight for one in net.out))

    return read_by(of_both)


CLASS_AND_POOL = {
    "cat": lambda c, p, w, u: F.linear(torch.cat([c, p], -1), torch.cat([w, u], 1)),
    "two projections": lambda c, p, w, u: F.linear(c, w) + F.linear(p, u),
    "two projections, pool first": lambda c, p, w, u: p @ u.T + c @ w.T,
}


def less(subtract):
    return read_by(lambda net, t: F.gelu(net.out[0](subtract(t[:, 1:], t[:, :1]))).mean(1, keepdim=True))


LESS_A_TOKEN = {
    "expanded": lambda x, c: x - c.expand_as(x),
    "broadcast": lambda x, c: x - c,
    "the negative": lambda x, c: x + -c,
    "times -1": lambda x, c: -1 * c + x,
    "one by one": lambda x, c: torch.stack([x[:, n] - c[:, 0] for n in range(TOKENS - 1)], 1),
}


def centered(subtract):
    return read_by(lambda net, t: t + net.scale * subtract(t, t.mean(1, keepdim=True)))


LESS_THE_MEAN = {
    "broadcast": lambda x, m: x - m,
    "expanded": lambda x, m: x - m.expand_as(x),
    "the negative": lambda x, m: x + -m,
    "reversed": lambda x, m: -(m - x),
}


TABLES = {
    "an MLP beside an attention": (BESIDE_MLP, parallel),
    "heads of unequal width": (UNEQUAL_HEADS, unequal),
    "learned weights of a residual": (LEARNED_RESIDUAL, weighted),
    "a class token and a pool": (CLASS_AND_POOL, class_and_pool),
    "less a token": (LESS_A_TOKEN, less),
    "less the mean": (LESS_THE_MEAN, centered),
}


@pytest.mark.parametrize(("name", "way"), ways(TABLES))
def test_terms_have_the_same_maps_however_they_are_written(name, way):
    check_like_the_first(way, *TABLES[name])


def by_einsum(a, m, w, u, b):
    return torch.einsum("bnc,dc->bnd", torch.cat([a, m], -1), torch.cat([w, u], 1)) + b


def by_stacking(t, f, w):
    return torch.einsum("s,sbnc->bnc", w, torch.stack([t, f]))


def rows_and_columns(net, layer, t):
    """Attend along the rows and the columns of the patches, in one batch."""
    grid = t[:, 1:].unflatten(1, (4, 4))
    both = torch.stack([grid, grid.transpose(1, 2)])
    rows, columns = net.branch(layer, both.flatten(0, 2)).view(both.shape)
    found = rows + columns.transpose(1, 2)
    return torch.cat([t[:, :1], t[:, 1:] + found.flatten(1, 2)], 1)


def inverse_exponentials(net, layer, t):
    t = t + net.branch(layer, t)
    return t + net.out[layer](1 / (1 + (-net.norm(t)).exp()))


def by_parity(net, layer, t):
    """Let each head attend to every other token, from the first or the second one on."""
    q, k, v = net.projected(layer, t[:, 1:])
    heads = [weights(q[:, n], k[:, n, n % 2 :: 2]) @ v[:, n, n % 2 :: 2] for n in range(HEADS)]
    return torch.cat([t[:, :1], t[:, 1:] + net.out[layer](torch.cat(heads, -1))], 1)


def gate_of_exponentials(net, layer, t):
    t = t + net.branch(layer, t)
    a, b = (one(net.norm(t)) for one in net.out)
    return t + b / (1 + (-a).exp())


def keys_in_two_parts(net, t):
    q, k, v = net.projected(0, t)
    a = weights(q[:, :, :1].mean(1, keepdim=True) * 0 + net.first[..., :3], k)
    return (a[..., :5] @ v[:, :, :5] + a[..., 5:] @ v[:, :, 5:]).transpose(1, 2).flatten(2)


REFUSED = {
    "a gate of exponentials": (gate_of_exponentials, "rollout", {}, "reached div"),
    "a pool of keys in two parts": (read_by(keys_in_two_parts), "rollout", {}, "reached add"),
    "a join of unlike channels in another order": (parallel(by_einsum), "rollout", {}, "reached bmm"),
    "a residual by a matrix": (weighted(by_stacking), "rollout", {}, "reached bmm"),
    "rows and columns in one batch": (rows_and_columns, "grad_rollout", {}, "cannot be told from windows"),
    "heads with different keys": (by_parity, "gae", {}, "the same queries, but different keys"),
    "an activation of exponentials": (inverse_exponentials, "evidence", {}, "reached reciprocal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name):
    block, method, options, reason = REFUSED[name]
    with pytest.raises(VitxError, match=reason):
        explained(block, passes=[{method: options}])


def pools_one_by_one(net, t):
    q, k, v = net.projected(0, t)
    given = net.first[..., :3] * torch.ones_like(q[:, :1, :1])[:, 0]
    heads = [weights(given, k[:, n]) @ v[:, n] for n in range(HEADS)]
    return torch.cat(heads, -1)


def test_heads_of_a_pool_that_run_one_by_one_are_not_fused():
    with pytest.raises(VitxError, match="attentions beside each other pool the same tokens"):
        explained(read_by(pools_one_by_one), passes=[{"rollout": {"head_fusion": "max"}}])


def one_by_one(net, layer, t):
    q, k, v = net.projected(layer, t)
    return t + net.out[layer](torch.cat([weights(q[:, n], k[:, n]) @ v[:, n] for n in range(HEADS)], -1))


def test_attention_fuses_heads_that_run_one_by_one():
    options = [{"attention": {"head_fusion": fusion}} for fusion in ("mean", "max", "min")]
    together = explained(lambda net, layer, t: t + net.branch(layer, t), passes=options)
    check_alike(explained(one_by_one, passes=options), together)


def test_a_projected_shortcut_keeps_as_much_as_a_plain_one():
    """As in BoTNet, whose stages begin with a strided one."""

    def block(shortcut):
        return lambda net, layer, t: (shortcut(net, t) if layer else t) + net.branch(layer, t)

    _, (plain,) = explained(block(lambda net, t: t), passes=[{"rollout": {}}])
    _, (projected,) = explained(block(lambda net, t: net.out[0](t)), passes=[{"rollout": {}}])
    torch.testing.assert_close(projected, plain)
