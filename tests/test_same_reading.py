"""What the score reads has the same maps, however it is written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.modules import Around
from tests.same_function import (
    BEGINNING,
    CLASSES,
    COUNT,
    IMAGES,
    SIDE,
    Net,
    check,
    fixed,
    found_maps,
    full_matrices,
    off,
    spellings,
)
from vitx import explain


def weights_of_tokens(net, t):
    """Return one weight for each token, (B, N, 1), as attention pooling computes it."""
    return net.pooling(net.score(t).softmax(1).mT).mT


def plain_pooling(net, t):
    return (weights_of_tokens(net, t).mT @ t)[:, 0]


def many_instances(net, t):
    """Pool one bag after the other, as attention-based multiple instance learning does."""
    bags = []
    for h in t:
        a = torch.softmax(net.score(h), dim=0)
        bags.append(torch.mm(a.T, h))
    return torch.cat(bags)


def transposed_first(net, t):
    a = F.softmax(torch.transpose(net.score(t), 2, 1), dim=2)
    return torch.bmm(a, t).squeeze(1)


def weights_below():
    """Return a weight for each token; some are 0, and some are negative."""
    return fixed(9, 1)[0]


def mean_of_some(net, t):
    return t[:, some_kept()].mean(1)


def some_kept():
    return torch.arange(COUNT) % 3 == 1


def pixels_in_rows(t):
    return t[:, 1:].unflatten(1, (SIDE, SIDE))


# The plain form of a read-out, and other spellings of it.
LIKE = {
    plain_pooling: {
        "pooling, a product and a sum": lambda net, t: (net.score(t).softmax(1) * t).sum(1),
        "pooling, values first": lambda net, t: (t * torch.softmax(net.score(t), 1)).sum(dim=1),
        "pooling, mm": many_instances,
        "pooling, bmm": transposed_first,
        "pooling, einsum": lambda net, t: torch.einsum("bn,bnc->bc", net.score(t)[..., 0].softmax(1), t),
        "pooling, tokens last": lambda net, t: (t.mT @ net.score(t).softmax(1))[..., 0],
        "pooling, matmul of rows": lambda net, t: torch.matmul(
            net.score(t).squeeze(-1).softmax(-1).unsqueeze(-2), t
        ).squeeze(-2),
        "pooling by hand": lambda net, t: (net.score(t).exp() * t).sum(1) / net.score(t).exp().sum(1),
    },
    mean_of_some: {
        "a masked mean": lambda net, t: (t * some_kept()[:, None]).sum(1) / some_kept().sum(),
        "a masked mean, matmul": lambda net, t: (some_kept().to(t)[None] @ t)[:, 0] / some_kept().sum(),
        "a masked mean, masked_fill": lambda net, t: (
            t.masked_fill(~some_kept()[:, None], 0).sum(1) / some_kept().sum()
        ),
        "a masked mean, where": lambda net, t: (
            torch.where(some_kept()[:, None], t, 0.0).sum(1) / some_kept().sum()
        ),
        "a masked mean, masked_select": lambda net, t: (
            t.masked_select(some_kept()[:, None]).view(len(t), -1, t.shape[-1]).mean(1)
        ),
    },
    lambda net, t: t[:, 4]: {
        "a one-hot selection": lambda net, t: torch.einsum(
            "n,bnc->bc", F.one_hot(torch.tensor(4), COUNT).to(t), t
        ),
        "a one-hot selection, a product and a sum": lambda net, t: (
            F.one_hot(torch.tensor(4), COUNT)[:, None] * t
        ).sum(1),
    },
    lambda net, t: sum(w * t[:, i] for i, w in enumerate(weights_below())): {
        "a weighted mean": lambda net, t: torch.einsum("n,bnc->bc", weights_below().to(t), t),
        "a weighted mean, a product and a sum": lambda net, t: (weights_below()[:, None] * t).sum(1),
    },
    lambda net, t: sum(w * t[:, 1 + i] for i, w in enumerate(weights_below()[1:])): {
        "a weighted mean, in two steps": lambda net, t: (
            (weights_below()[1:].view(SIDE, SIDE, 1) * pixels_in_rows(t)).sum(1).sum(1)
        )
    },
    lambda net, t: t[:, 1:].mean(1): {
        "a mean in two steps": lambda net, t: pixels_in_rows(t).mean(1).mean(1)
    },
}
READS = spellings(LIKE)


@pytest.mark.parametrize("name", READS)
def test_what_is_read(name):
    read, plain = READS[name]
    check(Net(read=read), Net(read=plain))


def gem(t, exponent):
    """Return the generalized mean of the patches."""
    return t[:, 1:].clamp(min=1e-6).pow(exponent).mean(1).pow(1 / exponent)


def held_gem(net, t):
    """Return the generalized mean with its gates held constant."""
    patches = t[:, 1:]
    powers = (patches * (patches.clamp(min=1e-6).pow(3) / patches).detach()).mean(1)
    return powers * (powers.pow(1 / 3) / powers).detach()


def gem_of_pictures(t, exponent):
    """Return the generalized mean as retrieval models write it."""
    picture = t[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    return F.avg_pool2d(picture.clamp(min=1e-6).pow(exponent), (SIDE, SIDE)).pow(1.0 / exponent).flatten(1)


@pytest.mark.parametrize("mean", [gem, gem_of_pictures])
@pytest.mark.parametrize("learned", [False, True])
def test_the_exponent_of_a_generalized_mean_may_be_learned(learned, mean):
    net = Net(read=lambda net, t: mean(t, net.exponent))
    net.exponent = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64)) if learned else 3.0
    evenly = torch.tensor([0.0, *[1 / 16] * 16], dtype=torch.float64)
    check(net, Net(read=held_gem), row=evenly)


def of_all_tokens(net, x):
    return net.head(net.tokens(x))


def of_pixels(net, x):
    """Return class scores for each patch, (B, CLASSES, SIDE, SIDE)."""
    return of_all_tokens(net, x)[:, 1:].mT.unflatten(2, (SIDE, SIDE))


def enlarged(net, x):
    return F.interpolate(of_pixels(net, x), scale_factor=2, mode="nearest")


def smoothly(net, x):
    return F.interpolate(of_pixels(net, x), scale_factor=2, mode="bilinear", align_corners=False)


def by_convolution(net, x):
    picture = net.tokens(x)[:, 1:].mT.unflatten(2, (SIDE, SIDE))
    kernel = net.out[2].weight[:CLASSES, :, None, None].expand(-1, -1, 3, 3)
    return F.conv2d(picture, kernel / 3, padding=1)


def by_queries(net, x):
    """Decode by one layer, in which learned queries attend to the tokens, (B, queries, CLASSES)."""
    q, k, v = net.projected(0, net.tokens(x), 1)
    q = net.place[:, 3:9].expand(len(x), -1, -1).unflatten(-1, (3, -1)).transpose(1, 2)
    mixed = (q @ k.mT).softmax(-1) @ v
    return net.head(net.place[:, 3:9] + net.joined(0, mixed, 1))


def by_class_tokens(net, x):
    """Return scores, (B, CLASSES), with a token and weights of its own for each class."""
    return (net.tokens(x)[:, :CLASSES] * net.head.weight).sum(-1) + net.head.bias


def two_class_tokens(net, x):
    return net.head(net.tokens(x)[:, :2])


# The output of a network, a target, the output of a wrapper and its target, and the token read, if only one.
READ_OF = {
    "a token of all": (of_all_tokens, lambda y: y[:, 5, 1], lambda y: y[:, 5], 1, 5),
    "the class token of all": (of_all_tokens, lambda y: y[:, 0, 2], lambda y: y[:, 0], 2, 0),
    "the second class token": (two_class_tokens, lambda y: y[:, 1, 2], lambda y: y[:, 1], 2, 1),
    "a class token by an int": (by_class_tokens, 3, lambda y: y[:, [3]], lambda y: y[:, 0], 3),
    "a class token by its class": (by_class_tokens, [2, 2], lambda y: y[:, 2:3], lambda y: y[:, 0], 2),
    "a pixel": (of_pixels, lambda y: y[:, 1, 2, 3], lambda y: y[:, :, 2, 3], 1, 12),
    "a pixel, enlarged": (enlarged, lambda y: y[:, 1, 4, 7], lambda y: y[:, :, 4, 7], 1, 12),
    "a pixel, smoothly enlarged": (smoothly, lambda y: y[:, 1, 4, 6], lambda y: y[:, :, 4, 6], 1),
    "a pixel behind a convolution": (by_convolution, lambda y: y[:, 1, 2, 2], lambda y: y[:, :, 2, 2], 1),
    "a query": (by_queries, lambda y: y[:, 4, 1], lambda y: y[:, 4], 1),
    "the largest query": (
        *(by_queries, lambda y: y[:, :, 1].amax(1)),
        *(lambda y: y[torch.arange(2), y[:, :, 1].argmax(1)], 1),
    ),
    "a query for each image": (by_queries, lambda y: y[SOME][:, 1], lambda y: y[SOME], 1),
    "a box of pixels": (
        *(of_pixels, lambda y: y[:, 1, :2, 1:].mean((1, 2))),
        *(lambda y: y[:, :, :2, 1:].mean((2, 3)), 1),
    ),
    "a mask of pixels": (
        *(of_pixels, lambda y: (y[:, 1] * torch.eye(SIDE)).sum((1, 2)) / SIDE),
        *(lambda y: y.diagonal(dim1=2, dim2=3).mean(2), 1),
    ),
}
SOME = torch.arange(2), torch.tensor([0, 3])


@pytest.mark.parametrize("name", READ_OF)
def test_each_method_begins_where_the_score_was_read(name):
    call, target, wrap, own, *token = READ_OF[name]
    net = Net()
    model, wrapper = Around(call, net), Around(lambda net, x: wrap(call(net, x)), net)
    found = found_maps(model, BEGINNING, target=target)
    far = off(found, found_maps(wrapper, BEGINNING, target=own))
    assert max(far.values()) < 1e-6, far
    if token:
        number = own if isinstance(own, int) else token[0]
        _, wanted = full_matrices(Net(read=lambda net, t: t[:, token[0]]), target=[number] * 2)
        far = off(found, wanted)
        assert max(far.values()) < 1e-6, far


def test_outputs_count_in_proportion_to_their_gradient():
    """The score is one pixel minus three times another; where a rollout begins, the sign does not matter."""
    model = Around(of_pixels, Net())
    one, other = (explain(model, IMAGES, target=lambda y, at=at: y[:, 1, at, at]).maps for at in (0, 2))
    found = explain(model, IMAGES, target=lambda y: y[:, 1, 0, 0] - 3 * y[:, 1, 2, 2]).maps
    assert off({"": found}, {"": (one + 3 * other) / 4})[""] < 1e-6
    assert off({"": one}, {"": other})[""] > 0.01


def test_a_rollout_without_a_target_begins_evenly():
    model = Around(of_all_tokens, Net())
    evenly = torch.full((COUNT,), 1 / COUNT, dtype=torch.float64)
    _, wanted = full_matrices(Net(), row=evenly)
    found = explain(model, IMAGES).maps
    assert off({"rollout": found}, wanted)["rollout"] < 1e-6
