"""Attention computed in tiles, against the textbook formula."""

from types import SimpleNamespace

import pytest
import torch

from vitx.functional import tiles
from vitx.functional.tiles import ALL, Memory
from vitx.tape.tensors import Keeper
from vitx.tape.weights import dot_product, joined, stored

B, H, N, D = 5, 3, 37, 8


TILES = {"images": 2**30, "some images": 4 * N * N, "rows": 700}


@pytest.fixture(params=TILES)
def tile(request, monkeypatch):
    """Limit a tile to one head of all images, of some images, or to some rows of one image's head."""
    monkeypatch.setattr(tiles, "_room", lambda device: TILES[request.param])
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 4)
    return request.param


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def tape(*, gradients=False):
    """Return a stand-in for the tape, which the attentions of one pass share."""
    return SimpleNamespace(network="plain" if gradients else None, memory=Memory(), keeper=Keeper())


def textbook(query, key, mask=None, scale=D**-0.5):
    scores = torch.einsum("bhid,bhjd->bhij", query.double(), key.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores, scores.softmax(-1)


MASKS = {
    "none": None,
    "added": torch.linspace(-3, 2, H * N * N).view(1, H, N, N),
    "boolean": torch.ones(N, N, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("known", [True, False], ids=["log_sum_exp", "softmax"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.usefixtures("tile")
def test_dot_product(mask, known, gradients):
    query, key, value, gradient = operands()
    scores, wanted = textbook(query, key, mask, 0.3)
    log_sum_exp = scores.logsumexp(-1).float() if known else None
    found = dot_product(
        tape(gradients=gradients), query, key, value, mask=mask, scale=0.3, log_sum_exp=log_sum_exp
    )
    assert torch.allclose(found.matrix().double(), wanted, rtol=1e-5, atol=1e-8)
    if gradients:
        outer = torch.einsum("bhid,bhjd->bhij", gradient.double(), value.double())
        assert torch.allclose(found.gradient(gradient).double(), outer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("tile")
def test_precision(dtype):
    query, key, value, _ = operands(dtype)
    found = dot_product(tape(), query, key, value)
    assert found.dtype == found.matrix().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.allclose(found.matrix().double(), textbook(query, key)[1], rtol=bound, atol=bound)


@pytest.mark.usefixtures("tile")
def test_stored():
    weights = torch.rand(B, H, N, N, dtype=torch.bfloat16)
    found = stored(tape(), weights, weights[..., :D], sums_to_1=False)
    assert torch.equal(found.matrix(), weights.float())


@pytest.mark.usefixtures("tile")
def test_stored_rows_that_half_precision_rounded_sum_to_1():
    weights = torch.rand(B, H, N, N).softmax(-1)
    half = weights.bfloat16()
    found = stored(tape(), half, half[..., :D], sums_to_1=True).matrix()
    assert torch.allclose(found.sum(-1), torch.ones(B, H, N), atol=1e-6)
    assert torch.allclose(found, half.float() / half.float().sum(-1, keepdim=True), atol=1e-7)
    exact = stored(tape(), weights, weights[..., :D], sums_to_1=True)
    assert torch.equal(exact.matrix(), weights)


@pytest.mark.usefixtures("tile")
def test_rows_go_back_to_the_keys():
    query, key, value, rows = operands()
    found = dot_product(tape(), query, key, value)
    wanted = torch.einsum("bhij,bhid->bhjd", textbook(query, key)[1], rows.double())
    assert torch.allclose(found.transposed(rows).double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.shared(rows).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("tile")
def test_rows_of_either_sign_share_by_size_and_those_of_zeros_nothing():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(B, H, N, N, generator=generator, dtype=torch.float64)
    weights[:, :, 3] = 0
    rows = torch.rand(B, H, N, 2, generator=generator, dtype=torch.float64)
    found = stored(tape(), weights, rows, sums_to_1=False).shared(rows)
    size = weights.abs().sum(-1, keepdim=True)
    share = torch.where(size == 0, 0, weights.abs() / torch.where(size == 0, 1, size))
    assert torch.allclose(found, torch.einsum("bhij,bhid->bhjd", share, rows))


def test_tiles_are_as_small_as_asked(tile):
    query, key, value, _ = operands()
    found = list(dot_product(tape(), query, key, value).tiles())
    sizes = [part.weights.numel() for part in found]
    assert sum(sizes) == B * H * N * N
    assert max(sizes) <= TILES[tile]
    assert len(found) == {"images": H, "some images": 2 * H, "rows": B * H * 3}[tile]


def test_without_gradients_nothing_of_the_model_is_held():
    """Queries, keys and values are often views of one tensor, all of which would be kept."""
    storage = torch.randn(3, B, H, N, D)
    query, key, value = storage.unbind(0)
    found = dot_product(tape(), query, key, value)
    before = found.matrix()
    storage.zero_()
    assert torch.equal(found.matrix(), before)


def test_what_is_kept_stays_as_it_was_when_the_model_writes_over_it():
    storage = torch.randn(3, B, H, N, D)
    query, key, value = storage.unbind(0)
    shared = tape(gradients=True)
    found = dot_product(shared, query, key, value)
    before, gradient = found.matrix(), found.gradient(torch.ones(B, H, N, D))
    shared.keeper.preserve([storage])
    storage.zero_()
    assert torch.equal(found.matrix(), before)
    assert torch.equal(found.gradient(torch.ones(B, H, N, D)), gradient)


HEADS = (2, 1, 3)


def parts(kind, sums_to_1=True):
    """Return attentions of one pass, which share their memory, and A and the values of all heads."""
    generator = torch.Generator().manual_seed(0)
    shared = tape(gradients=True)
    found, matrices, all_values = [], [], []
    for heads in HEADS:
        q, k, v = torch.randn(3, B, heads, N, D, generator=generator, dtype=torch.float64).unbind(0)
        a = (q @ k.mT * D**-0.5).softmax(-1)
        is_stored = kind == "stored" or (kind == "both" and heads == 1)
        found.append(stored(shared, a, v, sums_to_1=sums_to_1) if is_stored else dot_product(shared, q, k, v))
        matrices.append(a)
        all_values.append(v)
    return found, torch.cat(matrices, 1), torch.cat(all_values, 1)


def given(parts, gradient):
    """Return the attentions, each with its part of the gradient of A V."""
    pairs = zip(parts, gradient.split(HEADS, 1), strict=True)
    return [part.with_gradient(of_output) for part, of_output in pairs]


@pytest.mark.parametrize("kind", ["stored", "dot product", "both"])
class TestJoined:
    @pytest.mark.usefixtures("tile")
    def test_heads_stand_one_behind_the_other(self, kind):
        found, wanted, _ = parts(kind)
        whole = joined(found)
        assert whole.shape == (B, sum(HEADS), N, N)
        torch.testing.assert_close(whole.matrix(), wanted)
        rows = torch.randn(B, sum(HEADS), N, 2, dtype=torch.float64)
        torch.testing.assert_close(whole.transposed(rows), wanted.mT @ rows)

    def test_heads_of_all_parts_may_share_a_tile(self, kind):
        """This is the case on a GPU."""
        found, a, values = parts(kind)
        gradient = torch.randn(B, sum(HEADS), N, D, dtype=torch.float64)
        whole = joined(given(found, gradient))
        torch.testing.assert_close(whole.compute((ALL, ALL, ALL)), a)
        outer = whole.compute_gradient((ALL, slice(1, 5), ALL))
        torch.testing.assert_close(outer, (gradient @ values.mT)[:, 1:5])

    @pytest.mark.usefixtures("tile")
    def test_gradients_are_given_one_for_each(self, kind):
        found, a, values = parts(kind)
        gradient = torch.randn(B, sum(HEADS), N, D, dtype=torch.float64)
        weights, outer = shown = torch.full((2, B, sum(HEADS), N, N), torch.nan, dtype=torch.float64)
        for part in joined(given(found, gradient)).tiles():
            assert part.of_heads == sum(HEADS)
            for whole, some in zip(shown, (part.weights, part.gradient), strict=True):
                whole[part.images, part.heads, part.rows] = some
        torch.testing.assert_close(weights, a)
        torch.testing.assert_close(outer, gradient @ values.mT)


def test_joined_rows_sum_to_1_if_those_of_all_parts_do():
    certain, _, _ = parts("stored")
    doubtful, _, _ = parts("stored", sums_to_1=False)
    assert joined(certain).sums_to_1
    assert not joined([*certain[:2], doubtful[2]]).sums_to_1
