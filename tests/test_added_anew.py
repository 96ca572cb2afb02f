"""Terms that are added up anew in each layer, in many ways.

The first way adds them up in turn, and all others must have its maps.
"""

import functools

import pytest
import torch

from tests.blocks import HEADS, TOKENS, check_like_the_first, explained, weights
from vitx import VitxError


def in_turn(net, layer, t):
    return (t := t + net.branch(layer, t)) + net.mlp(t)


def anew(add, last=None):
    """Return a block that adds up all terms so far before each branch, and at its end by `last`."""

    def block(net, layer, t):
        terms = [t]
        for branch in (lambda t: net.branch(layer, t), net.mlp) * 2:
            terms.append(branch(add(terms)))
        return (last or add)(terms)

    return block


def by_slices(terms):
    return torch.cat([sum(t[:, :3] for t in terms), sum(t[:, 3:] for t in terms)], 1)


def twice(block):
    return lambda net, layer, t: block(net, layer, block(net, layer, t))


def kept_apart(net, layer, t):
    """Keep what was added apart from what it is added to."""
    more = net.branch(layer, t)
    for branch in (net.mlp, lambda t: net.branch(layer, t), net.mlp):
        more = more + branch(t + more)
    return t + more


def differences(net, layer, t):
    x = t
    for branch in (lambda t: net.branch(layer, t), net.mlp) * 2:
        x = t + ((x - t) + branch(x))
    return x


def halves(net, layer, t):
    q, k, v = net.projected(layer, t)
    parts = net.out[layer].weight.split(v.shape[-1], 1)
    heads = [weights(q[:, n], k[:, n]) @ v[:, n] @ parts[n].T for n in range(HEADS)]
    t = t / 2 + (sum(heads) + net.out[layer].bias) + t / 2
    return t + net.mlp(t)


def assigned(t):
    out = torch.empty_like(t)
    for n in range(TOKENS):
        out[:, n] = t[:, n]
    return out


def shortcut(net, layer, t):
    a = net.branch(layer, t)
    return t + a + net.mlp(t + a)


ADDED_ANEW = {
    "in turn": twice(in_turn),
    "sum": anew(sum),
    "sum, reversed": anew(lambda terms: sum(terms[::-1])),
    "stack": anew(lambda terms: torch.stack(terms).sum(0)),
    "mean": anew(lambda terms: torch.stack(terms).mean(0) * len(terms)),
    "from zeros": anew(lambda terms: sum(terms, torch.zeros_like(terms[0]))),
    "twice the halves": anew(lambda terms: 2 * sum(t / 2 for t in terms)),
    "every other": anew(lambda terms: sum(terms[::2]) + sum(terms[1::2])),
    "in place": anew(lambda terms: functools.reduce(lambda x, y: x.add_(y), terms[1:], terms[0].clone())),
    "slices": anew(by_slices),
    "kept apart": kept_apart,
    "differences": differences,
    "attention twice": twice(shortcut),
    "half of the input, twice": twice(halves),
    "half of what was assigned, twice": twice(lambda net, layer, t: halves(net, layer, assigned(t))),
}


def itself(block):
    return block


@pytest.mark.parametrize("way", [*ADDED_ANEW][1:])
def test_terms_that_are_added_up_anew_have_the_same_maps(way):
    check_like_the_first(way, ADDED_ANEW, itself)


def test_other_parts_of_the_terms_are_refused():
    """A sum by slices is not found among earlier sums of whole terms."""
    with pytest.raises(VitxError, match="reached add"):
        explained(anew(sum, by_slices), passes=[{"rollout": {}}])
