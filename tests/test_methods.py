"""The methods by name."""

import pytest
import torch

import vitx
from tests import models, oracle
from vitx import VitxError, explain
from vitx.methods import _METHODS, register

IMAGES = models.FAMILIES["deit"].images()


@pytest.fixture
def last_attention():
    """Registers the attention of the last layer as a method, for one test."""

    @register("last_attention", needs_gradients=False)
    def compute(evidence, *, head_fusion="mean"):
        last = next(evidence.attentions(0))
        row = evidence.readout(head_fusion)
        return torch.einsum("bi,bij->bj", row, last.mean(1))

    yield compute
    del _METHODS["last_attention"]


def test_methods():
    assert vitx.methods() == ["rollout", "grad_rollout"]


def test_the_list_is_a_copy():
    vitx.methods().append("nonsense")
    assert "nonsense" not in vitx.methods()


def test_a_new_method_is_known_everywhere(last_attention):
    assert vitx.methods() == ["rollout", "grad_rollout", "last_attention"]
    found = explain(models.built("deit"), IMAGES, "last_attention")
    seen = oracle.observe(models.built("deit", torch.float64), IMAGES.double())
    wanted = seen.attentions[-1].mean(1)[:, 0, 1:]
    assert torch.allclose(found.maps.double().flatten(1), wanted, atol=1e-6)
    with pytest.raises(VitxError, match="last_attention has no option 'start_layer': its options are head_f"):
        explain(models.built("deit"), IMAGES, "last_attention", start_layer=1)
    with pytest.raises(VitxError, match="the methods are rollout, grad_rollout, last_attention"):
        explain(models.built("deit"), IMAGES, "first_attention")


def test_a_removed_method_is_unknown():
    with pytest.raises(VitxError, match="there is no method 'last_attention'"):
        explain(models.built("deit"), IMAGES, "last_attention")


def test_a_method_with_gradients():
    @register("output_gradient", needs_gradients=True)
    def compute(evidence):
        (gradient, *_) = evidence.gradients(2)
        return gradient.abs().sum((1, 2))

    try:
        found = explain(models.built("deit"), IMAGES, "output_gradient", target=1)
    finally:
        del _METHODS["output_gradient"]
    seen = oracle.observe(models.built("deit", torch.float64), IMAGES.double(), 1)
    wanted = seen.gradients[-1].abs().sum((1, 2))[:, 1:]
    assert torch.allclose(found.maps.double().flatten(1), wanted, rtol=1e-4)
    assert found.target.tolist() == [1, 1]


def test_a_method_that_finds_nan_is_refused():
    @register("broken", needs_gradients=False)
    def compute(evidence):
        row = evidence.readout("mean").clone()
        row[1, 3] = float("nan")
        return row

    try:
        with pytest.raises(VitxError, match=r"the broken maps of images \[1\] are not finite"):
            explain(models.built("deit"), IMAGES, "broken")
    finally:
        del _METHODS["broken"]


def test_layers_are_computed_one_at_a_time():
    """Last layer first, and none before it is asked for."""
    computed = []

    @register("lazy", needs_gradients=False)
    def compute(evidence):
        for attention in evidence.attentions(1):
            computed.append(attention)
        return evidence.readout("mean")

    try:
        explain(models.built("deit"), IMAGES, "lazy")
    finally:
        del _METHODS["lazy"]
    seen = oracle.observe(models.built("deit", torch.float64), IMAGES.double())
    assert len(computed) == 2
    for found, wanted in zip(computed, reversed(seen.attentions[1:]), strict=True):
        assert torch.allclose(found.double(), wanted, atol=1e-5)
