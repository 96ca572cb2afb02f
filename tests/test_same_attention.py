"""An attention has the same maps, however it is written."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.same_function import COUNT, WIDTH, Net, attention_alone, check


def scored(make, mix=None):
    """Return a block with A from make(scores), and mix(A, v) in place of A @ v."""

    def block(net, layer, tokens):
        q, k, v = net.projected(layer, net.norms[layer](tokens))
        weights = net.attention(make(q @ k.mT / q.shape[-1] ** 0.5), layer)
        return tokens + net.joined(layer, (mix or torch.matmul)(weights, v))

    return block


def channels_first(net, layer, tokens):
    """Attend as LeViT, SHViT and MSRA's EfficientViT do: values (B, heads, D, N), with A on their right."""
    picture = net.norms[layer](tokens).mT
    linear, out = net.qkv[layer], net.out[layer]
    qkv = F.conv1d(picture, linear.weight[:, :, None], linear.bias)
    q, k, v = qkv.unflatten(1, (3, net.heads[0], -1)).unbind(1)
    attn = (q.transpose(-2, -1) @ k * q.shape[2] ** -0.5).softmax(dim=-1)
    picture = (v @ attn.transpose(-2, -1)).flatten(1, 2)
    return tokens + F.conv1d(picture, out.weight[:, :, None], out.bias).mT


def one_head_after_the_other(net, layer, tokens):
    """Split the weights by heads, as EfficientViT's cascade does; each head adds to the residual."""
    normed, size = net.norms[layer](tokens), WIDTH // net.heads[0]
    weights, biases = net.qkv[layer].weight.chunk(3), net.qkv[layer].bias.chunk(3)
    for head in range(net.heads[0]):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (F.linear(normed, w[own], b[own]) for w, b in zip(weights, biases, strict=True))
        mixed = torch.bmm((torch.bmm(q, k.mT) / size**0.5).softmax(2), v)
        tokens = tokens + mixed @ net.out[layer].weight[:, own].T
    return tokens + net.out[layer].bias


def fused_masked(mask):
    def block(net, layer, tokens):
        q, k, v = net.projected(layer, net.norms[layer](tokens))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[2]))
        return tokens + net.joined(layer, mixed)

    return block


def sigmoid(scores):
    return torch.sigmoid(scores - math.log(COUNT))


def diagonal(count):
    return torch.eye(count, dtype=torch.bool)


def without_diagonal(scores):
    return scores.masked_fill(diagonal(scores.shape[-1]), -math.inf).softmax(-1)


def diagonal_by_index(scores):
    at = torch.arange(scores.shape[-1])
    scores[:, :, at, at] = -math.inf
    return scores.softmax(-1)


def diagonal_by_a_view(scores):
    scores.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
    return scores.softmax(-1)


def diagonal_entry_by_entry(scores):
    for i in range(scores.shape[-1]):
        scores[..., i, i] = -math.inf
    return scores.softmax(-1)


def diagonal_by_index_put(scores):
    at = torch.arange(scores.shape[-1])
    every = [torch.arange(n)[(..., *[None] * (2 - d))] for d, n in enumerate(scores.shape[:2])]
    return torch.index_put(scores, (*every, at, at), torch.tensor(-math.inf, dtype=scores.dtype)).softmax(-1)


def summed(weights, v):
    return (weights.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def on_the_right(weights, v):
    return (v.mT @ weights.mT).mT


def shrunk(scores):
    """Return rows of a softmax that do not sum to 1."""
    return 0.5 * scores.softmax(-1)


def doubled(scores):
    return 2 * scores.softmax(-1)


def off_by_one(scores):
    """Return a softmax whose rows also attend to nothing, with a score of 0."""
    return torch.cat([scores, torch.zeros_like(scores[..., :1])], -1).softmax(-1)[..., :-1]


def one_more(exponentials):
    return 1 + exponentials.sum(-1, keepdim=True)


def greatest(scores):
    """Return a softmax with only the four greatest entries of each row."""
    weights = scores.softmax(-1)
    return weights * (weights >= weights.topk(4, -1).values[..., -1:])


def greatest_scattered(scores):
    values, at = scores.softmax(-1).topk(4, -1)
    return torch.zeros_like(scores).scatter(-1, at, values)


def distances(scores):
    at = torch.arange(scores.shape[-1], dtype=scores.dtype)
    return (at[:, None] - at).abs() / 5


def decaying(scores):
    """Return a softmax that falls off with the distance of the tokens."""
    return scores.softmax(-1) * (-distances(scores)).exp()


def gated(scores):
    """Return a softmax whose rows are weakened by a gate."""
    return scores.softmax(-1) * torch.sigmoid(scores.mean(-1, keepdim=True))


def of_half(scores):
    """Return exponentials over the sum of some of them."""
    return scores.exp() / scores[..., ::2].exp().sum(-1, keepdim=True)


ATTENTIONS = {
    "channels first": (channels_first, attention_alone),
    "one head after the other": (one_head_after_the_other, attention_alone),
    "a product and a sum": (scored(lambda s: s.softmax(-1), summed), attention_alone),
    "values on the left": (scored(lambda s: s.softmax(-1), on_the_right), attention_alone),
    "sigmoid": (scored(sigmoid), scored(sigmoid)),
    "sigmoid, a product and a sum": (scored(sigmoid, summed), scored(sigmoid)),
    "sigmoid, values on the left": (scored(sigmoid, on_the_right), scored(sigmoid)),
    "sigmoid by exp": (scored(lambda s: 1 / (1 + COUNT * (-s).exp())), scored(sigmoid)),
    "LSA, masked_fill": (scored(without_diagonal), scored(without_diagonal)),
    "LSA, fused": (fused_masked(lambda n: ~diagonal(n)), scored(without_diagonal)),
    "LSA, by index": (scored(diagonal_by_index), scored(without_diagonal)),
    "LSA, by a view": (scored(diagonal_by_a_view), scored(without_diagonal)),
    "LSA, entry by entry": (scored(diagonal_entry_by_entry), scored(without_diagonal)),
    "LSA, index_put": (scored(diagonal_by_index_put), scored(without_diagonal)),
    "half a softmax": (scored(shrunk), scored(shrunk)),
    "half a softmax, a product and a sum": (scored(shrunk, summed), scored(shrunk)),
    "off by one": (scored(off_by_one), scored(off_by_one)),
    "off by one, exp": (scored(lambda s: s.exp() / one_more(s.exp())), scored(off_by_one)),
    "off by one, log": (scored(lambda s: (s - one_more(s.exp()).log()).exp()), scored(off_by_one)),
    "off by one, divided afterwards": (
        scored(torch.exp, lambda w, v: w @ v / one_more(w)),
        scored(off_by_one),
    ),
    "divided afterwards, tokens first": (
        scored(torch.exp, lambda w, v: ((w @ v).transpose(1, 2) / w.sum(-1).mT[..., None]).transpose(1, 2)),
        attention_alone,
    ),
    "divided afterwards, by ones": (
        scored(torch.exp, lambda w, v: (w @ v) * (w @ torch.ones_like(v[..., :1])).reciprocal()),
        attention_alone,
    ),
    "the greatest alone": (scored(greatest), scored(greatest)),
    "the greatest alone, scattered": (scored(greatest_scattered), scored(greatest)),
    "decaying": (scored(decaying), scored(decaying)),
    "decaying, exp": (scored(lambda s: (s.log_softmax(-1) - distances(s)).exp()), scored(decaying)),
    "decaying, less logsumexp": (
        scored(lambda s: (s - s.logsumexp(-1, True) - distances(s)).exp()),
        scored(decaying),
    ),
    "gated": (scored(gated), scored(gated)),
    "over the sum of some": (scored(of_half), scored(of_half)),
    "twice a softmax, exp": (scored(lambda s: (s.log_softmax(-1) + math.log(2)).exp()), scored(doubled)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name):
    block, plain = ATTENTIONS[name]
    check(Net(block), Net(plain))
