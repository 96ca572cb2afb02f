"""Attentions beside each other are heads of one layer, however their sum is written."""

import pytest
import torch

from tests import oracle
from tests.same_function import IMAGES, TARGET, Net, check, full_matrices


def several(count, with_mlp=False):
    """Return a block of parallel attentions, plainly written."""

    def block(net, layer, tokens):
        normed = net.norms[layer](tokens)
        branch = sum(net.attended(layer, normed, number) for number in range(count))
        return tokens + (branch + net.fed(layer, tokens) if with_mlp else branch)

    return block


@pytest.mark.parametrize("heads", [2, 3])
def test_the_matrices_are_those_of_another_oracle(heads):
    """The other oracle captures A where the softmax computes it."""
    net = Net(heads=(heads,) * 3)
    seen, (_, maps) = oracle.observe(Net(heads=(heads,) * 3), IMAGES, TARGET), full_matrices(net)
    for method in ("rollout", "grad_rollout"):
        wanted = oracle.maps_of(seen, method, 1, "token")
        assert torch.allclose(maps[method].flatten(1), wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(maps["gae"].flatten(1), oracle.gae_maps(seen, 1, "token"), rtol=1e-9, atol=1e-12)


def all_terms(net, layer, tokens, count, with_mlp):
    normed = net.norms[layer](tokens)
    terms = [net.attended(layer, normed, number) for number in range(count)]
    return [*terms, net.fed(layer, tokens)] if with_mlp else terms


def beside(count, with_mlp, add):
    """Return a block of parallel attentions, whose sum `add` writes: (tokens, terms) -> tokens."""

    def block(net, layer, tokens):
        return add(tokens, all_terms(net, layer, tokens, count, with_mlp))

    return block


def one_by_one(tokens, terms):
    for term in terms:
        tokens = tokens + term
    return tokens


def one_by_one_in_place(tokens, terms):
    tokens = tokens.clone()
    for term in terms:
        tokens += term
    return tokens


def last_first(tokens, terms):
    total = terms[-1]
    for term in [*terms[-2::-1], tokens]:
        total = term + total
    return total


def by_two(tokens, terms):
    return (tokens + terms[0]) + sum(terms[1:])


def stacked(tokens, terms):
    return torch.stack([*terms, tokens], -1).sum(-1)


def separate_norms(net, layer, tokens):
    """Normalize the tokens separately for each attention, with the same weights."""
    terms = [net.attended(layer, net.norms[layer](tokens), number) for number in range(2)]
    return tokens + terms[0] + terms[1]


ADDITIONS = {
    "one by one": one_by_one,
    "one by one, in place": one_by_one_in_place,
    "the last first": last_first,
    "by two": by_two,
    "a stack": stacked,
}
BESIDE = {
    f"{count} attentions{', and an MLP' * with_mlp}{', of unlike heads' * (len(set(heads)) > 1)}: {name}": (
        beside(count, with_mlp, add),
        several(count, with_mlp),
        {"heads": heads, "with_mlp": with_mlp},
    )
    for count, with_mlp, heads in (
        (1, True, (3,)),
        (2, False, (3, 3)),
        (2, True, (3, 3)),
        (2, False, (2, 4)),
        (3, False, (3, 3, 3)),
        (3, True, (2, 3, 4)),
    )
    for name, add in ADDITIONS.items()
}
BESIDE["2 attentions, a norm each"] = (separate_norms, several(2), {})


@pytest.mark.parametrize("name", BESIDE)
def test_attentions_beside_each_other_are_heads_of_one_layer(name):
    block, plain, options = BESIDE[name]
    check(Net(block, **options), Net(plain, **options))
