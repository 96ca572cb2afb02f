"""Gates, products within a token, and padding have the same maps, however they are written."""

import pytest
import torch
from torch.nn import functional as F

from tests.blocks import check_like_the_first, ways, weights


def shared(net, layer, t):
    """Return q, k, v and a gate for each token, (B, N, 1), and for each token and head, (B, H, N, 1)."""
    q, k, v = net.projected(layer, t)
    gates = net.q[layer](t).unflatten(-1, (q.shape[1], -1)).mean(-1).sigmoid()
    return q, k, v, gates[..., :1], gates.mT[..., None]


def closed(net, layer, heads):
    return net.out[layer](heads.transpose(1, 2).flatten(2))


def gated_output(gate):
    """Gate the output of an attention: `gate(A, v, gates of heads)` returns it."""

    def block(net, layer, t):
        q, k, v, _, of_heads = shared(net, layer, t)
        return t + closed(net, layer, gate(weights(q, k), v, of_heads))

    return block


def mixed(mix):
    """Mix the values with those of the tokens as they are: `mix(gate, new, old)` returns the values."""

    def block(net, layer, t):
        q, k, v, gate, _ = shared(net, layer, t)
        old = t.unflatten(-1, (v.shape[1], -1)).transpose(1, 2)
        return t + closed(net, layer, weights(q, k) @ mix(gate[:, None], v, old))

    return block


def highway(mix):
    def block(net, layer, t):
        return mix(shared(net, layer, t)[3], t + net.branch(layer, t), t)

    return block


def within(function):
    """Add to a residual what a function computes from each token alone."""
    return lambda net, layer, t: t + net.branch(layer, t) + function(net.norm(t), net.scale)


MEANS = {
    "lerp": lambda g, f, x: torch.lerp(x, f, g),
    "two products": lambda g, f, x: g * f + (1 - g) * x,
    "two products, the other way": lambda g, f, x: x * (1 - g) + f * g,
    "a change": lambda g, f, x: x + g * (f - x),
}
BLOCKS = {
    "values": ({name: mixed(mix) for name, mix in MEANS.items()}, lambda block: block),
    "residuals": ({name: highway(mix) for name, mix in MEANS.items()}, lambda block: block),
    "activation": (
        {
            "silu": within(lambda t, _: F.silu(t)),
            "a product": within(lambda t, _: t * t.sigmoid()),
        },
        lambda block: block,
    ),
    "dot product of a token": (
        {
            "einsum": within(lambda t, s: torch.einsum("bnc,bnc->bn", t, t * s)[..., None] * t),
            "a sum": within(lambda t, s: (t * (t * s)).sum(-1, keepdim=True) * t),
            "a matrix product": within(lambda t, s: (t[..., None, :] @ (t * s)[..., None])[..., 0] * t),
        },
        lambda block: block,
    ),
}


@pytest.mark.parametrize(("name", "way"), ways(BLOCKS))
def test_blocks(name, way):
    check_like_the_first(way, *BLOCKS[name])
