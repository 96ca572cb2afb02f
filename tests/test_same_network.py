"""Networks with one unusual part have the same maps, however that part is written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.blocks import PASSES
from vitx import VitxError, explain, explain_methods

WIDTH, HEADS = 16, 2


class Net(nn.Module):
    """Patches, an attention with a residual, the part in question, and a mean of tokens with weights.

    Args:
        part: a function of the network and the tokens, (B, N, C), which returns tokens.
        embed: a function of the network and the images, which returns tokens.
    """

    def __init__(self, part=lambda net, t: t, embed=lambda net, x: net.patches(x).flatten(2).mT):
        super().__init__()
        torch.manual_seed(7)
        self.part, self.embed = part, embed
        self.patches, self.overlapping = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(3, WIDTH, 7, 4, padding=2)
        self.q, self.kv, self.qkv = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 3))
        self.out, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.first, self.queries = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(4, WIDTH))
        self.padded = nn.Conv2d(WIDTH, WIDTH, 4)

    def forward(self, images):
        t = self.embed(self, images)
        t = t + self.attended(*heads(self.qkv(t), 3))
        t = self.part(self, t)
        return self.head((t * torch.linspace(1, 2, t.shape[1]).to(t)[:, None]).sum(1))

    def attended(self, q, k, v):
        return self.joined((2 * q @ k.mT).softmax(-1) @ v)

    def joined(self, found):
        return self.out(found.transpose(1, 2).flatten(2))


def heads(projected, parts):
    return [one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in projected.chunk(parts, -1)]


def one_key(attend):
    """Attend to the mean of all tokens alone."""

    def part(net, t):
        q, k, v = *heads(net.q(t), 1), *heads(net.kv(t.mean(1, keepdim=True)), 2)
        return t + net.joined(attend(q, k, v))

    return part


def by_einsum(q, k, v):
    q, k, v = (one.flatten(0, 1) for one in (q, k, v))
    scores = torch.einsum("bid,bjd->bij", q, k)
    return torch.einsum("bij,bjd->bid", scores.softmax(-1), v).unflatten(0, (-1, HEADS))


def memory(attend):
    """Attend to learned tokens alone: a function of each token."""

    def part(net, t):
        (q,), (k, v) = heads(net.q(t), 1), heads(net.kv(net.queries[None].expand(len(t), -1, -1)), 2)
        return t + net.joined(attend(q, k, v))

    return part


def class_attention(apart):
    """Let a class token attend to itself and the patches, kept apart from them or in one tensor."""

    def part(net, t):
        c = net.first.expand(len(t), -1, -1)
        whole = torch.cat([c, t], 1)
        (q,), (k, v) = heads(net.q(whole[:, :1]), 1), heads(net.kv(whole), 2)
        own = c if apart else whole[:, :1]
        return torch.cat([own + net.attended(q, k, v), t], 1)

    return part


def in_place(scale):
    """Attend by views of one tensor, after the queries were scaled."""

    def part(net, t):
        qkv = net.qkv(t).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (qkv[number] for number in range(3))
        return t + net.attended(scale(q), k, v)

    return part


def with_queries(add):
    """Add the queries of all tokens but the first to what they attended, as MViT v2 does."""

    def part(net, t):
        q, k, v = heads(net.qkv(t), 3)
        return t + net.joined(add((q @ k.mT).softmax(-1) @ v, q))

    return part


def added_to_a_slice(found, q):
    found[:, :, 1:] += q[:, :, 1:]
    return found


def scale_later_tokens(q):
    q[:, :, 1:] = q[:, :, 1:] * 0.5
    return q


def picture(t):
    return t.mT.unflatten(2, (4, 4))


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def shrunk(shrink):
    def part(net, t):
        return t * shrink(picture(t)).flatten(2).mT.sigmoid()

    return part


def resized(function):
    return lambda net, t: function(picture(t)).flatten(2).mT


def bicubic_by_hand(x):
    eye = torch.eye(4).to(x)[None, None]
    (matrix,) = F.interpolate(eye, (4, 6), mode="bicubic")[0]
    return matrix.mT @ x @ matrix


def tiled(net, x, padding=0):
    return F.conv2d(x, net.padded.weight, stride=4, padding=padding).flatten(2).mT


def unfolded(change):
    """Embed overlapping patches with padding, a function of each pixel first or last."""
    return lambda net, x: change(net, x) @ net.overlapping.weight.flatten(1).mT


def averaged(function):
    """Scale tokens by the mean of a function of them."""
    return lambda net, t: t * function(t).mean(1, keepdim=True).tanh()


PARTS = {
    "one key": {
        "matrix products": one_key(lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
        "einsum": one_key(by_einsum),
        "a product": one_key(lambda q, k, v: (q @ k.mT).softmax(-1) * v),
        "fused": one_key(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0)),
    },
    "learned memory": {
        "matrix products": memory(lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v),
        "fused": memory(F.scaled_dot_product_attention),
    },
    "class attention": {"one tensor": class_attention(False), "apart": class_attention(True)},
    "queries in place": {
        "a product": in_place(lambda q: q * 0.5),
        "mul_": in_place(lambda q: q.mul_(0.5)),
    },
    "some queries in place": {
        "cat": in_place(lambda q: torch.cat([q[:, :, :1], q[:, :, 1:] * 0.5], 2)),
        "a slice": in_place(scale_later_tokens),
    },
    "some queries added": {
        "cat": with_queries(lambda y, q: torch.cat([y[:, :, :1], y[:, :, 1:] + q[:, :, 1:]], 2)),
        "a slice": with_queries(added_to_a_slice),
    },
    "pooled": {
        "mean": shrunk(lambda x: x.mean((2, 3), keepdim=True)),
        "adaptive_avg_pool2d": shrunk(lambda x: F.adaptive_avg_pool2d(x, 1)),
        "channels last": shrunk(lambda x: F.adaptive_avg_pool2d(channels_last(x), 1)),
    },
    "bicubic": {
        "matrices": resized(bicubic_by_hand),
        "interpolate": resized(lambda x: F.interpolate(x, (6, 6), mode="bicubic")),
        "channels last": resized(lambda x: F.interpolate(channels_last(x), (6, 6), mode="bicubic")),
    },
    "tiles with padding": {
        "pad": lambda net, t: tiled(net, F.pad(picture(t), (1, 1, 1, 1))),
        "padding": lambda net, t: tiled(net, picture(t), padding=1),
    },
    "a mean of activations": {
        "silu": averaged(F.silu),
        "a product": averaged(lambda t: t * t.sigmoid()),
        "exp": averaged(lambda t: t / (1 + (-t).exp())),
    },
}
EMBEDDINGS = {
    "gelu": {
        "first": unfolded(lambda net, x: F.unfold(F.gelu(x), 7, padding=2, stride=4).mT),
        "last": unfolded(lambda net, x: F.gelu(F.unfold(x, 7, padding=2, stride=4)).mT),
    },
}


def explained(model):
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = model.double().eval()
    return [one for some in PASSES for one in explain_methods(model, images, some, target=1).values()]


def check(one, other):
    for found, wanted in zip(explained(one), explained(other), strict=True):
        torch.testing.assert_close(found.logits, wanted.logits)
        limit = 1e-9 * wanted.maps.max().item()
        torch.testing.assert_close(found.maps, wanted.maps, rtol=0, atol=limit, msg=wanted.method)


@pytest.mark.parametrize(("name", "way"), [(n, way) for n, table in PARTS.items() for way in [*table][1:]])
def test_parts(name, way):
    table = PARTS[name]
    check(Net(table[way]), Net(next(iter(table.values()))))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name):
    first, last = EMBEDDINGS[name].values()
    check(Net(embed=last), Net(embed=first))


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence", "attention"])
def test_one_image_one_head_and_one_query(method):
    """A fused kernel without any dimension but channels and keys; its map is that of the same image twice."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.embed, self.first = nn.Conv2d(3, 8, 16, 16), nn.Parameter(torch.randn(1, 1, 8))
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x):
            t = torch.cat([self.first.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
            q, k, v = self.qkv(t)[:, None].chunk(3, -1)
            return self.head((t[:, :1] + F.scaled_dot_product_attention(q[:, :, :1], k, v)[:, 0])[:, 0])

    model, image = Alone().eval(), torch.rand(1, 3, 32, 32)
    twice = explain(model, image.repeat(2, 1, 1, 1), method, target=0)
    torch.testing.assert_close(explain(model, image, method, target=0).maps[0], twice.maps[0])


def pooled(queries):
    def part(net, t):
        k, v = net.kv(t).chunk(2, -1)
        return (3 * queries(net, t) @ k.mT).softmax(-1) @ v

    return Net(part).eval()


@pytest.mark.parametrize("method", ["rollout", "attention"])
def test_learned_queries_are_not_taken_for_heads(method):
    images = torch.rand(2, 3, 32, 32)
    learned = pooled(lambda net, t: net.queries)
    plain = pooled(lambda net, t: net.queries + 0 * t[:, :4])
    torch.testing.assert_close(explain(learned, images, method).maps, explain(plain, images, method).maps)
    with pytest.raises(VitxError, match="cannot be told from learned queries"):
        explain(learned, images, method, head_fusion="max")
