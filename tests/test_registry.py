"""The list of methods, and the registration of new ones."""

import re
from pathlib import Path

import pytest
import torch

import vitx
from tests import models, oracle
from vitx import VitxError, explain
from vitx.attribution import register
from vitx.attribution.registry import _METHODS

IMAGES = models.FAMILIES["deit"].images()
METHODS = ["rollout", "grad_rollout", "gae", "evidence", "attention", "legrad", "flow"]


@pytest.fixture
def last_attention():
    """Register the attention of the last layer as a method for one test."""

    @register("last_attention")
    def last_attention(back, *, head_fusion="mean"):
        ((one, readout),) = back.read_out()

        def attended(tile):
            share = readout[tile.images][:, tile.rows]
            return torch.einsum("bi,bij->bj", share, tile.weights.sum(1) / tile.of_heads)

        return back.place([back.add_up(one, attended)])

    yield
    del _METHODS["last_attention"]


def test_methods():
    assert vitx.methods() == METHODS


def test_the_list_is_a_copy():
    vitx.methods().append("nonsense")
    assert "nonsense" not in vitx.methods()


def test_a_new_method_is_known_everywhere(last_attention):
    assert vitx.methods() == [*METHODS, "last_attention"]
    found = explain(models.built("deit"), IMAGES, "last_attention")
    seen = oracle.observe(models.built("deit", torch.float64), IMAGES.double())
    wanted = seen.attentions[-1].mean(1)[:, 0, 1:]
    assert torch.allclose(found.maps.double().flatten(1), wanted, atol=1e-6)
    with pytest.raises(VitxError, match="last_attention has no option 'start_layer': its options are head_f"):
        explain(models.built("deit"), IMAGES, "last_attention", start_layer=1)
    with pytest.raises(VitxError, match=r"the methods are rollout, .*, last_attention$"):
        explain(models.built("deit"), IMAGES, "first_attention")


def test_a_method_without_options_says_so(failing):
    with pytest.raises(VitxError, match=r"failing has no option 'start_layer': it takes none$"):
        explain(models.built("deit"), IMAGES, "failing", start_layer=1)


def test_the_method_that_the_docs_add_is_right():
    page = Path(__file__).parents[1] / "docs" / "extending.md"
    text = page.read_text().split("\n## A logger")[0]
    names, before = {}, dict(_METHODS)
    try:
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            exec(block, names)
        assert tuple(names["explanation"].maps.shape) == (2, 10, 10)
        found = explain(models.built("distilled deit"), IMAGES, "handed_on", start_layer=1)
    finally:
        _METHODS.clear()
        _METHODS.update(before)
    seen = oracle.observe(models.built("distilled deit", torch.float64), IMAGES.double())
    matrices = [(a * g).clamp(min=0) for a, g in zip(seen.attentions, seen.gradients, strict=True)]
    wanted = sum(matrix[..., 2:].sum((1, 2)) for matrix in matrices[1:])
    assert torch.allclose(found.maps.double().flatten(1), wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"gradient": "scores"},
            "the gradient that typo reads must be in .*'score', 'layer scores'.*, found 'scores'",
        ),
        (
            {"fused_heads": True},
            "typo cannot have fused_heads: it reads a gradient, or has no head_fusion",
        ),
    ],
)
def test_a_method_that_cannot_be_is_refused(given, said):
    with pytest.raises(VitxError, match=said):
        register("typo", **given)(lambda seen: None)
    assert "typo" not in vitx.methods()


@pytest.mark.parametrize("methods", [{}, [], 3, None, [["rollout"]]])
def test_methods_must_be_named(methods):
    with pytest.raises(VitxError, match="methods must be names, or a mapping from names to options"):
        vitx.explain_methods(models.built("deit"), IMAGES, methods)


def test_methods_may_be_names():
    found = vitx.explain_methods(models.built("deit"), IMAGES, ["rollout", "gae"])
    assert list(found) == ["rollout", "gae"]
    assert list(vitx.explain_methods(models.built("deit"), IMAGES, "gae")) == ["gae"]
    with pytest.raises(VitxError, match="there is no method \\['rollout'\\]"):
        explain(models.built("deit"), IMAGES, ["rollout"])


def test_a_removed_method_is_unknown():
    with pytest.raises(VitxError, match="there is no method 'last_attention'"):
        explain(models.built("deit"), IMAGES, "last_attention")


def test_a_method_with_gradients():
    @register("output_gradient", gradient="score")
    def output_gradient(back):
        (last,) = back.layers[2].attentions
        return back.place([back.add_up(last, lambda tile: tile.gradient.abs().sum((1, 2)), gradient=True)])

    try:
        found = explain(models.built("deit"), IMAGES, "output_gradient", target=1)
    finally:
        del _METHODS["output_gradient"]
    seen = oracle.observe(models.built("deit", torch.float64), IMAGES.double(), 1)
    wanted = seen.gradients[-1].abs().sum((1, 2))[:, 1:]
    assert torch.allclose(found.maps.double().flatten(1), wanted, rtol=1e-4)
    assert found.target.tolist() == [1, 1]


def test_a_method_that_finds_nan_is_refused():
    @register("broken")
    def broken(back):
        (first,) = back.layers[0].attentions
        value, found = back.add_up(first, lambda tile: tile.weights.sum((1, 2)))
        found = found.clone()
        found[1, :, 3] = float("nan")
        return back.place([(value, found)])

    try:
        with pytest.raises(VitxError, match=r"the broken maps of images \[1\] are not finite"):
            explain(models.built("deit"), IMAGES, "broken")
    finally:
        del _METHODS["broken"]
