"""Residuals whose branch does more than attend, against full matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import oracle, visible
from vitx import VitxError, explain

SIDE, WIDTH, DEPTH = 4, 12, 3
TOKENS = SIDE * SIDE


class Block(nn.Module):
    """A residual around a branch.

    Attributes:
        a: the attention weights, with one head in each window, (B, windows, Q, K).
        matrix: the branch as a matrix over the tokens, (B, N, N).
    """

    def __init__(self):
        super().__init__()
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + self.branch(F.layer_norm(x, (WIDTH,)))

    def attended(self, q, k, v):
        self.a = ((2 * q) @ k.transpose(-2, -1)).softmax(-1)
        if torch.is_grad_enabled():  # for the oracle
            self.a = self.a.detach().requires_grad_()
        return self.a, self.a @ v

    def around(self):
        """Return the matrix that the branch applies to the output of its attention, (N, N)."""
        return torch.eye(TOKENS).double()

    def of_tokens(self, weights):
        """Lay out weights in the shape of A as a matrix over the tokens, (B, N, N)."""
        return weights[:, 0]


class Convolved(Block):
    def branch(self, x):
        a, mixed = self.attended(*(part[:, None] for part in self.qkv(x).chunk(3, -1)))
        grid = mixed[:, 0].transpose(1, 2).reshape(-1, WIDTH, SIDE, SIDE)
        self.matrix = self.around() @ a[:, 0]
        return self.mix(grid).flatten(2).transpose(1, 2)

    def around(self):
        near = F.unfold(torch.eye(TOKENS).view(TOKENS, 1, SIDE, SIDE), 3, padding=1).sum(1).double()
        return near / near.sum(1, keepdim=True)


class SharedQueries(Block):
    """A block whose windows, the rows of the grid, share the queries of the mean window."""

    def branch(self, x):
        windows = x.reshape(-1, SIDE, SIDE, WIDTH)
        _, k, v = self.qkv(windows).chunk(3, -1)
        q = self.qkv(windows.mean(1, keepdim=True)).chunk(3, -1)[0].expand(-1, SIDE, -1, -1)
        a, mixed = self.attended(q, k, v)
        self.matrix = self.of_tokens(a)
        return mixed.reshape(x.shape)

    def of_tokens(self, weights):
        return torch.stack([torch.block_diag(*one) for one in weights.detach()])


class Past(Block):
    """A block in which the first tokens attend, and the others bypass the attention."""

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
def test_what_rows_keep_leaves_the_same(options):
    """With one head, every fusion is the mean; but only for the mean are rows known to sum to 1."""
    model, images = built(Past)
    expected = explain(model, images, "rollout").maps
    torch.testing.assert_close(explain(model, images, "rollout", **options).maps, expected)


@pytest.mark.parametrize("method", ["grad_rollout", "gae", "evidence", "attention"])
def test_tokens_that_come_past_are_accounted_for_by_every_method(method):
    model, images = built(Past)
    found = explain(model, images, method, target=1)
    assert (found.conservation - 1).abs().max() < 1e-9


def kept_and_sent(block, weights, discard):
    """Return the matrix of a residual, (B, N, N), if the share that a token keeps depends on A.

    A row W of the attention with sum w keeps 1 / (1 + w) and sends W / (1 + w); `around` mixes both.
    """
    dropped = [[oracle.drop_smallest(matrix, discard) for matrix in image] for image in weights]
    sent = block.of_tokens(torch.stack([torch.stack(image) for image in dropped]))
    share = 1 / (1 + sent.sum(-1))
    return torch.diag_embed(share @ block.around().T) + block.around() @ (share[..., None] * sent)


@pytest.mark.parametrize("discard", [0, 0.5])
@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
@pytest.mark.parametrize("block", [Convolved, SharedQueries])
def test_what_a_token_keeps_is_computed_where_the_residual_is(block, method, discard):
    model, images = built(block)
    with torch.enable_grad(), visible.Linearized():
        score = model(images)[:, 1].sum()
    attentions = [one.a.detach() for one in model.blocks]
    if method == "grad_rollout":
        gradients = torch.autograd.grad(score, [one.a for one in model.blocks])
        attentions = [(a * g).clamp(min=0) for a, g in zip(attentions, gradients, strict=True)]
    row = torch.full((2, 1, TOKENS), 1 / TOKENS).double()
    for layer, weights in reversed(list(zip(model.blocks, attentions, strict=True))):
        row = row @ kept_and_sent(layer, weights, discard)
    found = explain(model, images, method, target=1, discard_ratio=discard)
    torch.testing.assert_close(found.maps, row.view(2, SIDE, SIDE), rtol=0, atol=1e-9)
    assert (found.conservation - 1).abs().max() < 1e-9


class Heads(Block):
    """A block with two heads in the batch dimension; `way` changes their values, (B, heads, N, d)."""

    def way(self, v):
        return v

    def branch(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        q, k, v = (part.flatten(0, 1) for part in (q, k, self.way(v)))
        return self.attended(q, k, v)[1].unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


class UnlikeParts(Heads):
    """Heads whose values are the second of two parts of different sizes, as in LeViT."""

    def way(self, v):
        return torch.cat([v[..., :1], v], -1).split([1, v.shape[-1]], -1)[1]


class Unknown(Heads):
    """Heads whose values pass through a call that does not show what becomes of the heads."""

    def way(self, v):
        return torch.where(v.new_ones(v.shape, dtype=torch.bool), v, v.roll(1, 2))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rollout", {"head_fusion": "max"}),
        ("rollout", {"discard_ratio": 0.5}),
        ("grad_rollout", {}),
        ("gae", {}),
    ],
)
def test_heads_that_may_be_windows_are_refused(method, options):
    model, images = built(Unknown)
    with pytest.raises(VitxError, match="cannot be told from windows, as several of its rows") as error:
        explain(model, images, method, target=1, **options)
    assert "\n" not in str(error.value)
    assert explain(model, images, "rollout").maps.shape == (2, SIDE, SIDE)


@pytest.mark.parametrize("method", ["grad_rollout", "gae"])
def test_heads_of_parts_of_unlike_sizes_are_heads(method):
    plain, images = built(Heads)
    split, _ = built(UnlikeParts)
    found, expected = (explain(model, images, method, target=1).maps for model in (split, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [Convolved, SharedQueries, Past])
def test_gae_adds_what_attention_carries(block):
    """A token keeps all of its own relevance, whatever A is."""
    model, images = built(block)
    found = explain(model, images, "gae", target=1)
    assert (found.conservation - 1).abs().max() < 1e-9


class Frequencies(nn.Module):
    """A stream with tokens from an operator without a rule behind those of the image."""

    def __init__(self):
        super().__init__()
        self.embed, self.transformed = nn.Conv2d(3, WIDTH, 8, 8), nn.Conv2d(6, WIDTH, 8, 8)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, images):
        found = torch.view_as_real(torch.fft.fft2(images)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        x = torch.cat([self.embed(images).flatten(2).mT, self.transformed(found).flatten(2).mT], 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + ((q @ k.mT).softmax(-1)) @ v
        return self.head(x[:, 0])


@pytest.mark.parametrize("options", [{}, {"head_fusion": "max"}])
def test_relevance_reaches_an_operator_without_a_rule_through_attention(options):
    """The token that is read does not come from that operator, but attends to tokens that do."""
    with pytest.raises(VitxError, match="% of the relevance reached view_as_real"):
        explain(Frequencies().eval(), torch.rand(2, 3, 32, 32), "rollout", **options)
