"""Several attentions that are heads of one layer, against one with all these heads."""

import pytest
import torch

from vitx.functional import tiles
from vitx.functional.tiles import Memory
from vitx.tape.joined import JoinedWeights
from vitx.tape.kept import Keeper
from vitx.tape.weights import DotProductWeights, StoredWeights

B, N, D = 3, 11, 4
HEADS = (2, 1, 3)


@pytest.fixture(params=[2**20, 5 * N], ids=["all", "some rows"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tiles, "_room", lambda device: request.param)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 5)


def parts(kind, keeps=True, sums_to_1=True):
    """Attentions of one pass, which share their memory; and A and the values of all heads."""
    generator = torch.Generator().manual_seed(0)
    shared = {"keeps": keeps, "memory": Memory(), "keeper": Keeper()}
    found, matrices, all_values = [], [], []
    for heads in HEADS:
        q, k, v = torch.randn(3, B, heads, N, D, generator=generator, dtype=torch.float64).unbind(0)
        a = (q @ k.mT * D**-0.5).softmax(-1)
        stored = kind == "stored" or (kind == "both" and heads == 1)
        weights = StoredWeights(a, v, sums_to_1=sums_to_1, **shared) if stored else None
        found.append(weights or DotProductWeights(q, k, v, **shared))
        matrices.append(a)
        all_values.append(v)
    return found, torch.cat(matrices, 1), torch.cat(all_values, 1)


@pytest.mark.parametrize("kind", ["stored", "dot product", "both"])
@pytest.mark.usefixtures("tile")
def test_heads_stand_one_behind_the_other(kind):
    found, wanted, _ = parts(kind)
    joined = JoinedWeights(found)
    assert joined.shape == (B, sum(HEADS), N, N)
    torch.testing.assert_close(joined.matrix(), wanted)
    rows = torch.randn(B, sum(HEADS), N, 2, dtype=torch.float64)
    torch.testing.assert_close(joined.transposed(rows), wanted.mT @ rows)


@pytest.mark.parametrize("kind", ["stored", "dot product", "both"])
@pytest.mark.usefixtures("tile")
def test_gradients_are_given_one_for_each(kind):
    found, a, values = parts(kind)
    gradient = torch.randn(B, sum(HEADS), N, D, dtype=torch.float64)
    weights, outer = shown = torch.full((2, B, sum(HEADS), N, N), torch.nan, dtype=torch.float64)
    for tile in JoinedWeights(found).tiles(list(gradient.split(HEADS, 1))):
        assert tile.of_heads == sum(HEADS)
        for whole, part in zip(shown, (tile.weights, tile.gradient), strict=True):
            whole[tile.images, tile.heads, tile.rows] = part
    torch.testing.assert_close(weights, a)
    torch.testing.assert_close(outer, gradient @ values.mT)


def test_rows_sum_to_1_if_those_of_all_parts_do():
    certain, _, _ = parts("stored")
    doubtful, _, _ = parts("stored", sums_to_1=False)
    assert JoinedWeights(certain).sums_to_1
    assert not JoinedWeights([*certain[:2], doubtful[2]]).sums_to_1
