"""Attention whose weights are no plain softmax of scores, written in many ways.

In each table, the first way is the plain one, and all others must have its maps.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.blocks import TOKENS, check_like_the_first, explained
from vitx import VitxError

TOP = 5  # keys that each query attends to


def attends(attend):
    """Return a block whose heads are `attend(scores, q, k, v)`."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        out = attend(q @ k.mT / q.shape[-1] ** 0.5, q, k, v)
        return t + net.out[layer](out.transpose(1, 2).flatten(2))

    return block


def of_scores(weigh):
    return lambda s, q, k, v: weigh(s) @ v


def over_one_more(s):
    e = s.exp()
    return e / (1 + e.sum(-1, keepdim=True))


def over_one_more_stable(s):
    top = s.amax(-1, keepdim=True).clamp(min=0)
    e = (s - top).exp()
    return e / (e.sum(-1, keepdim=True) + (-top).exp())


OFF_BY_ONE = {
    "one more": of_scores(over_one_more),
    "less the greatest": of_scores(over_one_more_stable),
    "a column of zeros": of_scores(lambda s: F.pad(s, (0, 1)).softmax(-1)[..., :-1]),
    "a joined column of zeros": of_scores(
        lambda s: torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)[..., :-1]
    ),
    "a key and a value of zeros": lambda s, q, k, v: (
        (q @ F.pad(k, (0, 0, 0, 1)).mT / q.shape[-1] ** 0.5).softmax(-1) @ F.pad(v, (0, 0, 0, 1))
    ),
    "a key and a value of zeros, fused": lambda s, q, k, v: F.scaled_dot_product_attention(
        q, *(F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    ),
    "divided afterwards": lambda s, q, k, v: s.exp() @ v / (1 + s.exp().sum(-1, keepdim=True)),
    "less softplus": of_scores(lambda s: (s - F.softplus(s.logsumexp(-1, keepdim=True))).exp()),
}

RELU = {
    "relu": of_scores(lambda s: F.relu(s) / TOKENS),
    "clamp": of_scores(lambda s: s.clamp(min=0) / TOKENS),
    "a mask": of_scores(lambda s: s * (s > 0) / TOKENS),
    "where": of_scores(lambda s: torch.where(s > 0, s, 0) / TOKENS),
    "masked_fill": of_scores(lambda s: s.masked_fill(s < 0, 0) / TOKENS),
    "divided afterwards": lambda s, q, k, v: F.relu(s) @ v / TOKENS,
    "einsum, divided afterwards": lambda s, q, k, v: (
        torch.einsum("bhij,bhjd->bihd", F.relu(s), v).transpose(1, 2) / TOKENS
    ),
}


def positive(s):
    return F.relu(s) + 1e-3


SHARES = {
    "over their sum": of_scores(lambda s: positive(s) / positive(s).sum(-1, keepdim=True)),
    "times a reciprocal": of_scores(lambda s: positive(s) * positive(s).sum(-1, keepdim=True).reciprocal()),
    "divided afterwards": lambda s, q, k, v: positive(s) @ v / positive(s).sum(-1, keepdim=True),
}

SQUARES = {
    "power": of_scores(lambda s: F.relu(s) ** 2 / TOKENS),
    "square": of_scores(lambda s: F.relu(s).square() / TOKENS),
    "a product": of_scores(lambda s: F.relu(s) * F.relu(s) / TOKENS),
}

SIGMOID = {
    "sigmoid": of_scores(torch.sigmoid),
    "exp": of_scores(lambda s: 1 / (1 + torch.exp(-s))),
    "tanh": of_scores(lambda s: (1 + torch.tanh(s / 2)) / 2),
    "a softmax of two": of_scores(lambda s: torch.stack([s, torch.zeros_like(s)], -1).softmax(-1)[..., 0]),
    "logsigmoid": of_scores(lambda s: F.logsigmoid(s).exp()),
    "less the rest": of_scores(lambda s: 1 - torch.sigmoid(-s)),
}


def of_pairs(q, k):
    return q[..., None, :] - k[..., None, :, :]


DISTANCE = {
    "cdist": lambda s, q, k, v: (-(torch.cdist(q, k) ** 2)).softmax(-1) @ v,
    "squares of differences": lambda s, q, k, v: (-of_pairs(q, k).square().sum(-1)).softmax(-1) @ v,
    "norm of differences": lambda s, q, k, v: (-(of_pairs(q, k).norm(dim=-1) ** 2)).softmax(-1) @ v,
    "a product and squares": lambda s, q, k, v: (
        (2 * q @ k.mT - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[..., None, :]).softmax(-1) @ v
    ),
}


def least(s):
    return s.topk(TOP, -1).values[..., -1:]


def scattered(s):
    values, places = s.topk(TOP, -1)
    return torch.zeros_like(s).scatter(-1, places, values.softmax(-1))


SPARSE = {
    "masked_fill": of_scores(lambda s: s.masked_fill(s < least(s), -math.inf).softmax(-1)),
    "where": of_scores(lambda s: torch.where(s >= least(s), s, -math.inf).softmax(-1)),
    "a mask added": of_scores(
        lambda s: (s + torch.zeros_like(s).masked_fill(s < least(s), -math.inf)).softmax(-1)
    ),
    "kthvalue": of_scores(
        lambda s: s.masked_fill(s < s.kthvalue(TOKENS - TOP + 1, -1, keepdim=True).values, -math.inf).softmax(
            -1
        )
    ),
    "scattered": of_scores(scattered),
}

TABLES = {
    "a softmax off by one": OFF_BY_ONE,
    "ReLU": RELU,
    "shares": SHARES,
    "squares": SQUARES,
    "sigmoid": SIGMOID,
    "distances": DISTANCE,
    "the greatest scores": SPARSE,
}


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, table in TABLES.items() for way in [*table][1:]]
)
def test_weights_have_the_same_maps_however_they_are_written(name, way):
    check_like_the_first(way, TABLES[name], attends)


def learned_key(mix):
    """Return a block whose queries also attend to a learned key; its value, (1, 1, d), is learned, too."""

    def block(net, layer, t):
        q, k, v = net.projected(layer, t)
        key, value = net.first[:, None, :, : q.shape[-1]], net.place[:, None, :1, : q.shape[-1]]
        a = torch.cat([q @ key.mT, q @ k.mT], -1).softmax(-1)
        return t + net.out[layer](mix(a, v, value).transpose(1, 2).flatten(2))

    return block


def gathered(s, q, k, v):
    """Attend to values that each query gathers."""
    values, places = s.topk(TOP, -1)
    chosen = (
        v[:, :, None].expand(-1, -1, TOKENS, -1, -1).gather(3, places[..., None].expand(*places.shape, 3))
    )
    return torch.einsum("bhik,bhikd->bhid", values.softmax(-1), chosen)


REFUSED = {
    "the value of a learned key, times its weights": (
        learned_key(lambda a, v, value: a[..., 1:] @ v + a[..., :1] * value),
        *("rollout", "reached mul"),
    ),
    "the value of a learned key, by a matrix product": (
        learned_key(lambda a, v, value: a[..., 1:] @ v + a[..., :1] @ value),
        *("rollout", "reached"),
    ),
    "learned values for each query and key": (
        attends(
            lambda s, q, k, v: (
                s.softmax(-1) @ v
                + torch.einsum(
                    "bhij,ijd->bhid", s.softmax(-1), torch.nn.Parameter(torch.ones(TOKENS, TOKENS, 3).to(v))
                )
            )
        ),
        *("rollout", "reached bmm"),
    ),
    "gathered values": (attends(gathered), "grad_rollout", "cannot be told from windows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name):
    block, method, reason = REFUSED[name]
    with pytest.raises(VitxError, match=reason):
        explained(block, passes=[{method: {}}])
