"""What is done around a network has the same maps, however it is written."""

import pytest
import torch

from tests.modules import Around
from tests.same_function import (
    CLASSES,
    IMAGES,
    METHODS,
    TARGET,
    Net,
    found_maps,
    frozen,
    full_matrices,
    in_shares,
    off,
)
from vitx import explain, explain_methods

MEAN, DEVIATION = (
    torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.3, 0.4, 0.5], [0.7, 0.8, 0.9])
)


def normalized_in_place(net, x):
    x.sub_(MEAN).div_(DEVIATION)
    return net(x)


def normalized_by_channel(net, x):
    for channel in range(3):
        x[:, channel] -= MEAN[channel, 0, 0]
        x[:, channel].div_(DEVIATION[channel, 0, 0])
    return net(x)


def normalized_into(net, x):
    torch.sub(x, MEAN, out=x)
    return net(torch.div(x, DEVIATION, out=x))


@pytest.mark.parametrize("call", [normalized_in_place, normalized_by_channel, normalized_into])
def test_an_input_that_is_normalized_in_place(call):
    """The caller's images stay unchanged."""
    _, wanted = full_matrices(Net(), (IMAGES - MEAN) / DEVIATION)
    images = IMAGES.clone()
    found = explain_methods(frozen(Around(call, Net())), images, list(METHODS), target=TARGET)
    assert torch.equal(images, IMAGES)
    maps = {name: one.signed if name == "evidence" else one.maps for name, one in found.items()}
    far = off(maps, in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def same(x):
    return x


def mirrored(x):
    return x.flip(-1)


def turned_by(quarters):
    return lambda x: torch.rot90(x, quarters, (-2, -1))


def in_one_batch(net, x):
    return net(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0)


def in_turns(net, x):
    """Interleave the images with their mirror images, which are written over copies."""
    twice = x.repeat_interleave(2, 0)
    twice[1::2] = twice[1::2].flip(3)
    return net(twice).unflatten(0, (-1, 2)).mean(1)


def by_turning(net, x):
    total = 0
    for quarters in range(4):
        total += net(torch.rot90(x, quarters, (2, 3)))
    return total / 4


def into_rows(one, other, x):
    made = x.new_empty(2, len(x), CLASSES)
    made[0], made[1] = one(x), other(x)
    return made.mean(0)


def features_first(one, other, x):
    """Average the features of two networks, and read them by one head."""
    features = (one.read(one, one.tokens(x)) + other.read(other, other.tokens(x))) / 2
    return one.head(features)


TWO = (lambda: Net(seed=4), lambda: Net(read=lambda net, t: t[:, 1:].mean(1), seed=6))
FLIPS = [(0, same, same), (0, mirrored, mirrored)]
TURNS = [(0, turned_by(n), turned_by(-n)) for n in range(4)]
BOTH = [(0, same, same), (1, same, same)]
# (call, members in even shares); member: (number of the network, change of its input, inverse for its map)
TOGETHER = {
    "mirrored, two calls": (lambda net, x: (net(x) + net(x.flip(3))) / 2, FLIPS),
    "mirrored, a stack": (lambda net, x: torch.stack([net(x), net(x.flip(-1))]).mean(0), FLIPS),
    "mirrored, one batch": (in_one_batch, FLIPS),
    "mirrored, one batch, in turns": (in_turns, FLIPS),
    "mirrored, lerp": (lambda net, x: torch.lerp(net(x), net(x.flip(3)), 0.5), FLIPS),
    "turned": (by_turning, TURNS),
    "turned, a stack": (
        lambda net, x: torch.stack([net(torch.rot90(x, n, (2, 3))) for n in range(4)], 1).mean(1),
        TURNS,
    ),
    "two networks": (lambda one, other, x: (one(x) + other(x)) / 2, BOTH),
    "two networks, a stack": (lambda one, other, x: torch.stack([one(x), other(x)], -1).mean(-1), BOTH),
    "two networks, rows": (into_rows, BOTH),
    "two networks, one head": (features_first, BOTH),
    "two networks, einsum": (
        lambda one, other, x: torch.einsum("nbk->bk", torch.stack([one(x), other(x)])) / 2,
        BOTH,
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_averaged_in_the_network(name):
    call, members = TOGETHER[name]
    nets = [make() for make in TWO[: 1 + max(number for number, *_ in members)]]
    if call is features_first:
        nets[1].head = nets[0].head
    share = 1 / len(members)
    parts = [
        {key: back(value) for key, value in full_matrices(nets[number], change(IMAGES), share)[1].items()}
        for number, change, back in members
    ]
    wanted = {key: sum(part[key] for part in parts) for key in parts[0]}
    for method in ("rollout", "grad_rollout", "gae"):
        wanted[method] = wanted[method] * share
    far = off(found_maps(frozen(Around(call, *nets))), in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def test_the_mean_of_two_networks_of_probabilities():
    """Rollout does not depend on the class, so probabilities serve as well as logits."""
    nets = [make() for make in TWO]
    model = Around(lambda one, other, x: (one(x).softmax(-1) + other(x).softmax(-1)) / 2, *nets)
    wanted = sum(full_matrices(net)[1]["rollout"] for net in nets) / 2
    assert off({"rollout": explain(model, IMAGES).maps}, {"rollout": wanted})["rollout"] < 1e-6
