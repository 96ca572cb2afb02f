"""The places of tokens, found from the forward pass, however the model arranges them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitx
from vitx.viewer.lattice import NOWHERE, cells

ROWS = torch.arange(16).view(4, 4)


class Little(nn.Module):
    """A model of sixteen patches, some arrangement of them, and one attention in a residual."""

    def __init__(self, arrange, keys=lambda tokens: tokens):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.arrange, self.keys = arrange, keys

    def forward(self, images):
        tokens = self.arrange(self, self.patches(images))
        keys = self.keys(tokens)
        return tokens + F.scaled_dot_product_attention(tokens[:, None], keys[:, None], keys[:, None])[:, 0]


def flat(grid):
    return grid.flatten(2).mT


def windows(grid):
    return (
        grid.roll((1, 0), (2, 3)).unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).reshape(4, 4, 8)
    )


def pooled(tokens):
    return flat(F.avg_pool2d(tokens.mT.unflatten(2, (4, 4)), 2))


TURNED = ROWS.roll(1, 0).unfold(0, 2, 2).unfold(1, 2, 2).reshape(4, 4)
SOME = [0, 3, 1, 9, 11]  # none from the last row
CASES = {
    "rows": (Little(lambda self, grid: flat(grid)), ROWS.view(1, 16)),
    "columns": (Little(lambda self, grid: flat(grid.mT)), ROWS.mT.reshape(1, 16)),
    "class token": (
        Little(lambda self, grid: torch.cat([flat(grid), self.token], 1)),
        torch.cat([ROWS.view(1, 16), torch.tensor([[-1]])], 1),
    ),
    "padding": (
        Little(lambda self, grid: F.pad(flat(grid), (0, 0, 2, 0))),
        F.pad(ROWS.view(1, 16), (2, 0), value=NOWHERE),
    ),
    "shifted windows": (Little(lambda self, grid: windows(grid)), TURNED),
    "some dropped": (Little(lambda self, grid: flat(grid)[:, SOME]), torch.tensor([SOME])),
    "the first rows": (Little(lambda self, grid: flat(grid)[:, :8]), torch.arange(8).view(1, 8)),
    "fewer keys": (Little(lambda self, grid: flat(grid), pooled), ROWS.view(1, 16)),
}  # fmt: skip


def found(model):
    with torch.no_grad(), vitx.capture(model) as trace:
        model(torch.randn(1, 3, 16, 16))
    return cells(trace.tape, trace.self_attentions, 1)


@pytest.mark.parametrize("name", CASES)
def test_each_token_has_its_cell(name):
    model, wanted = CASES[name]
    ((queries, keys),) = found(model)
    assert queries.grid == (4, 4)
    assert torch.equal(queries.of, wanted)
    assert queries.own == (name == "class token")
    if name == "fewer keys":
        assert keys.grid == (2, 2)
        assert keys.of.tolist() == [[0, 1, 2, 3]]
    else:
        assert torch.equal(keys.of, wanted)


MERGED = {
    "in the same place": [[*range(16)], [5, 6, 9, 10], [0, 3, 12, 15]],
    "few": [[*range(16)], [1, 2, 3, 4], [2, 3]],
    "between the patches": [[0, 1], [2, 3, 7], [4, 5, 6, 8, 13], [9, 10, 14], [11, 15], [12]],
}


@pytest.mark.parametrize("name", MERGED)
def test_tokens_without_a_grid(name):
    """Each token is a mean of several patches."""
    parts = MERGED[name]
    model = Little(lambda self, grid: torch.stack([flat(grid)[:, part].mean(1) for part in parts], 1))
    ((queries, keys),) = found(model)
    assert queries.grid == keys.grid == ()
    assert (queries.of == NOWHERE).all()
