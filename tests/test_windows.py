"""Attention in windows, written in many ways: each map is that of attention among all tokens with a mask."""

import math
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitx

SIDE, WINDOW, WIDTH = 4, 2, 12
ALONG = SIDE // WINDOW
COUNT, INSIDE = ALONG**2, WINDOW**2


def windows():
    """Return the numbers of the tokens in each window, (windows, tokens)."""
    grid = torch.arange(SIDE * SIDE).view(ALONG, WINDOW, ALONG, WINDOW)
    return grid.transpose(1, 2).reshape(COUNT, INSIDE)


class Net(nn.Module):
    """Two blocks of attention and an MLP; `way` computes the heads of one block, concatenated."""

    def __init__(self, way, heads, projects):
        super().__init__()
        torch.manual_seed(3)
        self.way, self.heads = way, heads
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.place = nn.Parameter(torch.randn(1, SIDE * SIDE, WIDTH) * 0.3)
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in "12")
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) if projects else nn.Identity() for _ in "12")
        self.mlp, self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), nn.Linear(WIDTH, 5)
        with torch.no_grad():
            for one in self.qkv:
                one.weight *= 4

    def forward(self, x):
        t = self.embed(x).flatten(2).mT + self.place
        for qkv, out in zip(self.qkv, self.out, strict=True):
            t = t + out(self.way(lambda w, qkv=qkv: split(qkv(w), self.heads), self.norm(t)))
            t = t + self.mlp(self.norm(t))
        return self.head(t.mean(1))


def split(qkv, heads):
    """Return queries, keys and values, (B, heads, N, d)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def attend(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def joined(out):
    return out.transpose(1, 2).flatten(2)


def cut(t):
    return t.view(len(t), ALONG, WINDOW, ALONG, WINDOW, -1).transpose(2, 3).reshape(-1, INSIDE, t.shape[-1])


def put_together(w):
    return w.view(-1, ALONG, ALONG, WINDOW, WINDOW, w.shape[-1]).transpose(2, 3).flatten(1, 4)


def masked(project, t):
    q, k, v = project(t)
    of = torch.empty(SIDE * SIDE, dtype=torch.long)
    of[windows()] = torch.arange(COUNT)[:, None]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(of[:, None] != of, -math.inf)
    return joined(scores.softmax(-1) @ v)


def written(project, t):
    out = torch.zeros_like(t)
    for inside in windows():
        out[:, inside] = joined(attend(*project(t[:, inside])))
    return out


def added(project, t):
    out = torch.zeros_like(t)
    for inside in windows():
        out = out.index_add(1, inside, joined(attend(*project(t[:, inside]))))
    return out


def gathered(project, t):
    at = windows().flatten()[None, :, None].expand(len(t), -1, WIDTH)
    out = joined(attend(*project(t.gather(1, at).view(-1, INSIDE, WIDTH)))).view_as(t)
    return torch.zeros_like(t).scatter(1, at, out)


def in_the_batch(project, t):
    out = joined(attend(*project(torch.cat([t[:, inside] for inside in windows()]))))
    return torch.zeros_like(t).index_copy(1, windows().flatten(), torch.cat(out.chunk(COUNT), 1))


def unfolded(project, t):
    parts = F.unfold(t.mT.unflatten(2, (SIDE, SIDE)), WINDOW, stride=WINDOW).unflatten(1, (WIDTH, INSIDE))
    out = joined(attend(*project(parts.permute(0, 3, 2, 1).reshape(-1, INSIDE, WIDTH))))
    out = out.unflatten(0, (-1, COUNT)).permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(out, (SIDE, SIDE), WINDOW, stride=WINDOW).flatten(2).mT


def sorted_tokens(project, t):
    order = windows().flatten()
    q, k, v = (part[:, :, order].unflatten(2, (COUNT, INSIDE)) for part in project(t))
    return joined(attend(q, k, v).flatten(2, 3)[:, :, order.argsort()])


def heads_in_the_batch(project, t):
    q, k, v = project(cut(t))
    out = attend(*(part.transpose(0, 1).flatten(0, 1) for part in (q, k, v)))
    return put_together(joined(out.unflatten(0, (q.shape[1], -1)).transpose(0, 1)))


def heads_one_by_one(project, t):
    parts = zip(*(part.unbind(1) for part in project(cut(t))), strict=True)
    return put_together(torch.cat([attend(*one) for one in parts], -1))


def heads_of_convolutions(project, t):
    """Compute each head by weights of its own, and join them in the batch dimension."""
    qkv = project.__defaults__[0]
    weights = qkv.weight.unflatten(0, (3, -1)), qkv.bias.unflatten(0, (3, -1))
    heads = project(t)[0].shape[1]
    q, k, v = (
        torch.cat([F.conv1d(cut(t).mT, a[..., None], b).mT for a, b in zip(*each, strict=True)])
        for each in zip(*([one.chunk(heads) for one in part] for part in weights), strict=True)
    )
    return put_together(torch.cat(attend(q, k, v).chunk(heads), -1))


WAYS = {
    "cut and put together": lambda project, t: put_together(joined(attend(*project(cut(t))))),
    "fused": lambda project, t: put_together(joined(F.scaled_dot_product_attention(*project(cut(t))))),
    "a loop that writes": written,
    "a loop that adds": added,
    "gather and scatter": gathered,
    "in the batch": in_the_batch,
    "unfold and fold": unfolded,
    "sorted": sorted_tokens,
    "heads in the batch": heads_in_the_batch,
    "heads one by one": heads_one_by_one,
    "heads of convolutions": heads_of_convolutions,
}
PASSES = (
    {"rollout": {}},
    {"grad_rollout": {}, "gae": {}, "evidence": {}},
    {"rollout": {"head_fusion": "max"}, "grad_rollout": {"head_fusion": "min"}},
    {"grad_rollout": {"gradient": "plain"}},
)


def explained(way, heads, projects):
    """Return the output of a network, and its maps by each pass and method."""
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Net(way, heads, projects).double().eval()
    found = [vitx.explain_methods(model, images, methods, target=1) for methods in PASSES]
    with torch.no_grad():
        return model(images), [one.maps for methods in found for one in methods.values()]


expected = cache(partial(explained, masked))


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_windows_are_a_mask(way, heads, projects):
    (output, found), (right, wanted) = explained(WAYS[way], heads, projects), expected(heads, projects)
    assert torch.allclose(output, right)
    for maps, of_mask in zip(found, wanted, strict=True):
        torch.testing.assert_close(maps, of_mask, rtol=0, atol=1e-9 * of_mask.max().item())
