"""A small network of exchangeable blocks, and the maps of a block that is written in some way."""

import functools

import torch
from torch import nn

import vitx

WIDTH, TOKENS, HEADS = 12, 17, 4


class Net(nn.Module):
    """A class token, 16 patches and two blocks; `shared` is the number of heads of keys and values."""

    def __init__(self, block, shared=HEADS):
        super().__init__()
        torch.manual_seed(5)
        self.block, self.shared = block, shared
        self.embed, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 5)
        self.first, self.place = (nn.Parameter(torch.randn(1, n, WIDTH)) for n in (1, TOKENS))
        self.q, self.out = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "12") for _ in "qo")
        inner = WIDTH // HEADS * shared
        self.k, self.v = (nn.ModuleList(nn.Linear(WIDTH, inner) for _ in "12") for _ in "kv")
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.around = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        with torch.no_grad():
            for one in (*self.q, *self.k):
                one.weight *= 3

    def forward(self, x):
        patches = self.embed(x).flatten(2).mT
        t = torch.cat([self.first.expand(len(x), -1, -1), patches], 1) + self.place
        for layer in range(2):
            t = self.block(self, layer, t)
        return self.head(t[:, 0])

    def projected(self, layer, t):
        pairs = ((self.q, HEADS), (self.k, self.shared), (self.v, self.shared))
        t = self.norm(t)
        return [one[layer](t).unflatten(-1, (heads, -1)).transpose(1, 2) for one, heads in pairs]

    def branch(self, layer, t):
        q, k, v = self.projected(layer, t)
        return self.out[layer]((weights(q, k) @ v).transpose(1, 2).flatten(2))

    def of_class(self, layer, t):
        """Return what the class token gets from all, (B, 1, C)."""
        q, k, v = self.projected(layer, t)
        return self.out[layer]((weights(q[:, :, :1], k) @ v).transpose(1, 2).flatten(2))


def weights(q, k):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


PASSES = (
    {"rollout": {}, "grad_rollout": {}, "gae": {}, "evidence": {}},
    {"rollout": {"head_fusion": "max"}, "grad_rollout": {"gradient": "plain"}},
)


def explained(block, shared=HEADS, passes=PASSES):
    """Return the output and all maps of a network of these blocks, with keys and values of `shared` heads."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Net(block, shared).double().eval()
    found = [one for some in passes for one in vitx.explain_methods(model, images, some, target=1).values()]
    return found[0].logits, [one.maps for one in found]


def check_alike(found, wanted):
    """Assert that two blocks have the same output and the same maps."""
    torch.testing.assert_close(found[0], wanted[0])
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * other.max().item())


def ways(tables):
    """Return the name of each table with each of its ways but the first."""
    return [(name, way) for name, (table, *_) in tables.items() for way in [*table][1:]]


@functools.cache
def _plain(make, first, shared):
    return explained(make(first), shared)


def check_like_the_first(way, table, make, shared=HEADS):
    """Assert that `make` returns a block with the same maps for a way of a table as for its first one."""
    check_alike(explained(make(table[way]), shared), _plain(make, next(iter(table.values())), shared))
