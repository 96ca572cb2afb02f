"""The math of the rollouts on plain tensors, compared with the oracle."""

import math

import pytest
import torch

from tests import oracle
from vitx import VitxError, attention_rollout, gradient_rollout
from vitx.functional.rollout import discard

B, HEADS, N, LAYERS = 2, 3, 10, 4


def random_layers(dtype=torch.float64, layers=LAYERS):
    attentions = [torch.randn(B, HEADS, N, N, dtype=torch.float64).softmax(-1) for _ in range(layers)]
    gradients = [torch.randn(B, HEADS, N, N, dtype=torch.float64) for _ in range(layers)]
    return [a.to(dtype) for a in attentions], [g.to(dtype) for g in gradients]


def expected(attentions, gradients, fusion, discard, readout):
    """Return readout^T R, (B, N)."""
    rows = []
    for image in range(B):
        matrices = []
        for layer, attention in enumerate(attentions):
            if gradients is None:
                fused = oracle.fuse(attention[image].double(), fusion)
            else:
                product = attention[image].double() * gradients[layer][image].double()
                fused = oracle.fuse(product, fusion).clamp(min=0)
            matrices.append(oracle.drop_smallest(fused, discard))
        weights = readout if readout.ndim == 1 else readout[image]
        rows.append(weights.double() @ oracle.rollout(matrices))
    return torch.stack(rows)


def readouts():
    one_hot = torch.zeros(N, dtype=torch.float64)
    one_hot[0] = 1
    return {
        "default": (None, one_hot),
        "shared": (shared := torch.rand(N, dtype=torch.float64), shared),
        "per image": (own := torch.rand(B, N, dtype=torch.float64), own),
    }


@pytest.mark.parametrize("readout", ["default", "shared", "per image"])
@pytest.mark.parametrize("discard", [0, 0.3, 0.9])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
class TestAgainstTheOracle:
    def test_attention_rollout(self, fusion, discard, readout, dtype, tolerance):
        attentions, _ = random_layers(dtype)
        given, weights = readouts()[readout]
        found = attention_rollout(attentions, head_fusion=fusion, discard_ratio=discard, readout=given)
        assert found.dtype == dtype
        assert oracle.relative_error(found, expected(attentions, None, fusion, discard, weights)) < tolerance

    def test_gradient_rollout(self, fusion, discard, readout, dtype, tolerance):
        attentions, gradients = random_layers(dtype)
        given, weights = readouts()[readout]
        found = gradient_rollout(
            attentions, gradients, head_fusion=fusion, discard_ratio=discard, readout=given
        )
        assert found.dtype == dtype
        assert (found >= 0).all()
        wanted = expected(attentions, gradients, fusion, discard, weights)
        assert oracle.relative_error(found, wanted) < tolerance


def test_two_layers_by_hand():
    """All attention is on token 1 in the first layer and on token 2 in the last."""
    first, last = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    first[..., 1] = 1
    last[..., 2] = 1
    # The class token attends half to itself and half to token 2; by then, each holds half of token 1.
    assert attention_rollout([first, last]).tolist() == [[0.25, 0.5, 0.25]]


def test_rollout_shares_sum_to_one():
    attentions, _ = random_layers()
    assert torch.allclose(attention_rollout(attentions).sum(1), torch.ones(B, dtype=torch.float64))


def test_gradient_rollout_pairs_each_attention_with_its_own_gradient():
    attentions, gradients = random_layers()
    swapped = gradient_rollout(attentions, gradients[::-1])
    assert not torch.allclose(swapped, gradient_rollout(attentions, gradients), rtol=1e-3)


def test_layers_may_differ_in_heads():
    few, many = torch.rand(1, 2, 5, 5).softmax(-1), torch.rand(1, 4, 5, 5).softmax(-1)
    assert torch.allclose(
        attention_rollout([few, many]), attention_rollout([few.mean(1, True), many.mean(1, True)])
    )


def test_inputs_are_not_changed():
    attentions, gradients = random_layers()
    copies = [a.clone() for a in attentions], [g.clone() for g in gradients]
    gradient_rollout(attentions, gradients, discard_ratio=0.5)
    attention_rollout(attentions, discard_ratio=0.5)
    assert all(map(torch.equal, attentions, copies[0]))
    assert all(map(torch.equal, gradients, copies[1]))


def test_result_needs_no_gradient():
    attentions, gradients = random_layers()
    attentions[0].requires_grad_()
    assert not attention_rollout(attentions).requires_grad
    assert not gradient_rollout(attentions, gradients).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype):
    attentions, gradients = random_layers(dtype)
    full = [a.float() for a in attentions], [g.float() for g in gradients]
    found = attention_rollout(attentions), gradient_rollout(attentions, gradients)
    for half, wanted in zip(found, (attention_rollout(full[0]), gradient_rollout(*full)), strict=True):
        assert half.dtype == torch.float32
        # Nothing is computed in half precision either.
        assert torch.equal(half, wanted)


class TestDiscard:
    @pytest.mark.parametrize("ratio", [0.001, 0.1, 0.29, 0.3, 0.5, 0.9, 0.999])
    @pytest.mark.parametrize("tokens", [3, 10, 17])
    def test_drops_exactly_the_floor(self, ratio, tokens):
        matrix = torch.rand(2, tokens, tokens, dtype=torch.float64) + 1
        matrix[:, 0, 0] = 3  # never among the smallest
        dropped = (discard(matrix, ratio) == 0).flatten(1).sum(1)
        assert dropped.tolist() == [math.floor(ratio * (tokens * tokens))] * 2

    def test_drops_the_smallest(self):
        matrix = torch.arange(1.0, 10).view(1, 3, 3).flip(-1, -2)
        assert discard(matrix, 0.5).tolist() == [[[9, 8, 7], [6, 5, 0], [0, 0, 0]]]

    def test_keeps_class_to_class(self):
        matrix = torch.arange(1.0, 10).view(1, 3, 3)
        assert discard(matrix, 0.5).tolist() == [[[1, 0, 0], [0, 5, 6], [7, 8, 9]]]

    @pytest.mark.parametrize("ratio", [0.3, 0.9])
    def test_of_equal_entries_the_first_go(self, ratio):
        kept = discard(torch.full((2, N, N), 1 / N), ratio).flatten(1)
        count = math.floor(ratio * (N * N))
        assert (kept[:, 0] == 1 / N).all()
        assert (kept[:, 1:count] == 0).all()
        assert torch.equal(kept[:, count:], torch.full_like(kept[:, count:], 1 / N))

    def test_each_image_has_its_own_threshold(self):
        small, large = torch.rand(1, N, N), torch.rand(1, N, N) + 5
        both = discard(torch.cat([small, large]), 0.4)
        assert torch.equal(both[:1], discard(small, 0.4))
        assert torch.equal(both[1:], discard(large, 0.4))

    @pytest.mark.parametrize("levels", [1, 2, 5, 1000])
    @pytest.mark.parametrize("count", [1, 7, 50, 99])
    def test_equals_a_stable_sort(self, levels, count):
        """With few levels, most entries are equal."""
        matrix = torch.randint(levels, (3, 10, 10)) / levels
        wanted = matrix.flatten(1).clone()
        wanted.scatter_(1, wanted.argsort(dim=1, stable=True)[:, :count], 0)
        wanted[:, 0] = matrix[:, 0, 0]
        assert torch.equal(discard(matrix, (count + 0.5) / 100), wanted.view_as(matrix))

    def test_changes_nothing_in_place(self):
        matrix = torch.rand(2, N, N)
        before = matrix.clone()
        discard(matrix, 0.5)
        assert torch.equal(matrix, before)


SQUARE = torch.full((2, 3, 4, 4), 0.25)


@pytest.mark.parametrize(
    ("attentions", "options", "sentence"),
    [
        ([], {}, "attentions is empty"),
        ([SQUARE[0]], {}, r"found shape \(3, 4, 4\)"),
        ([SQUARE[..., :3]], {}, r"found shape \(2, 3, 4, 3\)"),
        ([SQUARE, SQUARE[:1]], {}, r"found \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"),
        ([SQUARE, SQUARE[:, :, :3, :3]], {}, r"found \(2, 3, 4, 4\) and \(2, 3, 3, 3\)"),
        (["text"], {}, "attentions must be"),
        ([SQUARE], {"head_fusion": "median"}, "found 'median'"),
        ([SQUARE], {"head_fusion": None}, "found None"),
        ([SQUARE], {"discard_ratio": 1}, "found 1"),
        ([SQUARE], {"discard_ratio": -0.1}, "found -0.1"),
        ([SQUARE], {"discard_ratio": float("nan")}, "found nan"),
        ([SQUARE], {"discard_ratio": "0.5"}, "found '0.5'"),
        ([SQUARE], {"discard_ratio": True}, "found True"),
        ([SQUARE], {"readout": torch.ones(3)}, r"\(4,\) or \(2, 4\), found \(3,\)"),
        ([SQUARE], {"readout": torch.ones(3, 4)}, r"found \(3, 4\)"),
        ([SQUARE], {"readout": torch.ones(())}, r"found \(\)"),
    ],
)
def test_bad_input(attentions, options, sentence):
    with pytest.raises(VitxError, match=sentence):
        attention_rollout(attentions, **options)
    with pytest.raises(VitxError, match=sentence):
        gradient_rollout(attentions, attentions, **options)


@pytest.mark.parametrize(
    ("gradients", "sentence"),
    [
        ([], "gradients is empty"),
        ([SQUARE], "2 layers of attentions and 1 of gradients"),
        ([SQUARE, SQUARE[..., 0]], r"gradients must be .* found shape \(2, 3, 4\)"),
        ([SQUARE[:1], SQUARE[:1]], r"\(1, 3, 4, 4\)"),
        ([SQUARE[:, :2], SQUARE[:, :2]], r"\(2, 2, 4, 4\)"),
        ([SQUARE[:, :, :2, :2], SQUARE[:, :, :2, :2]], r"\(2, 3, 2, 2\)"),
    ],
)
def test_gradients_that_do_not_fit(gradients, sentence):
    with pytest.raises(VitxError, match=sentence):
        gradient_rollout([SQUARE, SQUARE], gradients)
