"""A residual around attention whose branch does more than attend, against full matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitx import VitxError, explain

SIDE, WIDTH, DEPTH = 4, 12, 3
TOKENS = SIDE * SIDE


class Block(nn.Module):
    """A residual around a branch; keeps what the branch does to the tokens, (B, N, N)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + self.branch(F.layer_norm(x, (WIDTH,)))

    def attended(self, q, k, v):
        a = ((2 * q) @ k.transpose(-2, -1)).softmax(-1)
        return a, a @ v


class Convolved(Block):
    def branch(self, x):
        self.matrix, mixed = self.attended(*self.qkv(x).chunk(3, -1))
        grid = mixed.transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        near = F.unfold(torch.eye(TOKENS).view(TOKENS, 1, SIDE, SIDE), 3, padding=1).sum(1).double()
        self.matrix = (near / near.sum(1, keepdim=True)) @ self.matrix
        return self.mix(grid).flatten(2).transpose(1, 2)


class SharedQueries(Block):
    """All windows, the rows of the grid, are asked by the same queries, of the mean window."""

    def branch(self, x):
        windows = x.reshape(-1, SIDE, SIDE, WIDTH)
        _, k, v = self.qkv(windows).chunk(3, -1)
        q = self.qkv(windows.mean(1, keepdim=True)).chunk(3, -1)[0].expand(-1, SIDE, -1, -1)
        a, mixed = self.attended(q, k, v)
        self.matrix = torch.stack([torch.block_diag(*one) for one in a.detach()])
        return mixed.reshape(x.shape)


class Past(Block):
    """The first tokens attend; the others come past."""

    FIRST = 3

    def branch(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        a, mixed = self.attended(q[:, : self.FIRST], k, v)
        self.matrix = torch.eye(TOKENS).double().repeat(len(x), 1, 1)
        self.matrix[:, : self.FIRST] = a.detach()
        return torch.cat((mixed, x[:, self.FIRST :]), 1)


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 5)
        self.blocks = nn.ModuleList([block() for _ in range(DEPTH)])

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def built(block):
    torch.manual_seed(0)
    return Model(block).double().eval(), torch.randn(2, 3, 2 * SIDE, 2 * SIDE).double()


@pytest.mark.parametrize("block", [Convolved, SharedQueries, Past])
def test_rollout_is_the_product_of_full_matrices(block):
    model, images = built(block)
    found = explain(model, images, "rollout").maps
    row = torch.full((2, 1, TOKENS), 1 / TOKENS).double()
    for layer in reversed(model.blocks):
        row = (row + row @ layer.matrix.detach()) / 2
    torch.testing.assert_close(found, row.view(2, SIDE, SIDE), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"head_fusion": "max"}, {"head_fusion": "min"}])
def test_what_is_given_back_by_the_queries_leaves_the_same(options):
    """There is one head, so that its maximum is its mean; but the sum of its rows is not relied upon."""
    model, images = built(Past)
    expected = explain(model, images, "rollout").maps
    torch.testing.assert_close(explain(model, images, "rollout", **options).maps, expected)


@pytest.mark.parametrize("method", ["grad_rollout", "gae", "evidence", "attention"])
def test_tokens_that_come_past_are_accounted_for_by_every_method(method):
    model, images = built(Past)
    found = explain(model, images, method, target=1)
    assert (found.conservation - 1).abs().max() < 1e-9


@pytest.mark.parametrize("block", [Convolved, SharedQueries])
def test_what_a_token_keeps_is_not_guessed(block):
    model, images = built(block)
    for method, options in (("rollout", {"discard_ratio": 0.5}), ("grad_rollout", {"target": 1})):
        with pytest.raises(VitxError, match="other tokens than its queries came from"):
            explain(model, images, method, **options)
    explain(model, images, "gae", target=1)  # what a token has, it keeps whatever A is
