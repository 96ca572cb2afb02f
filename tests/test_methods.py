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

    class LastAttention:
        def __init__(self, readout, layers):
            self.readout, self.start_layer = readout, layers - 1
            self.relevance = torch.zeros_like(readout)

        def read(self, tile):
            share = self.readout[tile.images][:, tile.rows]
            self.relevance[tile.images] += torch.einsum("bi,bij->bj", share, tile.weights.mean(1))

        def end_layer(self):
            pass

    @register("last_attention", needs_gradients=False)
    def begin(evidence, *, head_fusion="mean"):
        return LastAttention(evidence.readout(head_fusion), len(evidence.trace.layers))

    yield begin
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


class Sum:
    """Adds up what `part` makes of each tile."""

    def __init__(self, evidence, part, start_layer):
        self.relevance = torch.zeros_like(evidence.readout("mean"))
        self.part, self.start_layer = part, start_layer

    def read(self, tile):
        self.relevance[tile.images] += self.part(tile)

    def end_layer(self):
        pass


def test_a_method_with_gradients():
    @register("output_gradient", needs_gradients=True)
    def begin(evidence):
        return Sum(evidence, lambda tile: tile.gradient.abs().sum((1, 2)), 2)

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
    def begin(evidence):
        begun = Sum(evidence, lambda tile: 0, 0)
        begun.relevance[1, 3] = float("nan")
        return begun

    try:
        with pytest.raises(VitxError, match=r"the broken maps of images \[1\] are not finite"):
            explain(models.built("deit"), IMAGES, "broken")
    finally:
        del _METHODS["broken"]
