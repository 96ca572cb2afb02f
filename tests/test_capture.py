"""What is captured in one forward pass."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests import models, oracle, visible
from tests.oracle import close
from vitx import VitxError, capture

FAMILIES = sorted(models.FAMILIES)


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def score_of(output):
    return logits_of(output)[:, 2].sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_attentions_and_gradients_equal_the_oracle(name):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with capture(model, gradients=True) as trace:
        output = model(images)
    tolerance = 1e-9 if family.exact else 1e-5
    assert close(trace.attentions(), wanted.attentions, tolerance)
    assert close(trace.gradients(score_of(output)), wanted.gradients, tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_output_is_the_same_to_the_bit(name, gradients):
    model, images = models.built(name), models.FAMILIES[name].images()
    with torch.set_grad_enabled(gradients):
        plain = logits_of(model(images))
        with capture(model, gradients=gradients):
            seen = logits_of(model(images))
    assert torch.equal(plain, seen)


def test_attentions_are_rows_of_shares():
    model = models.built("deit")
    with torch.no_grad(), capture(model) as trace:
        model(models.FAMILIES["deit"].images())
    assert [tuple(a.shape) for a in trace.attentions()] == [(2, 3, 17, 17)] * 3
    for attention in trace.attentions():
        assert torch.allclose(attention.sum(-1), torch.ones(()))


@pytest.mark.parametrize("options", [{}, {"gradients": True}])
def test_the_gradients_of_the_model_are_the_same(options):
    found = {}
    for name in ("watched", "alone"):
        model = copy.deepcopy(models.built("deit"))
        with capture(model, **options) if name == "watched" else nullcontext():
            logits = model(models.FAMILIES["deit"].images())
        logits[:, 1].sum().backward()
        found[name] = [p.grad.clone() for p in model.parameters()]
    for watched, alone in zip(*found.values(), strict=True):
        assert torch.equal(watched, alone)


def test_no_parameter_gradient_is_made():
    model = models.deit().eval()
    with capture(model, gradients=True) as trace:
        output = model(models.FAMILIES["deit"].images())
    trace.gradients(score_of(output))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_attentions_are_float32():
    model = models.deit().bfloat16().eval()
    with capture(model, gradients=True) as trace:
        output = model(models.FAMILIES["deit"].images(dtype=torch.bfloat16))
    assert {a.dtype for a in trace.attentions()} == {torch.float32}
    assert {g.dtype for g in trace.gradients(score_of(output))} == {torch.float32}


def test_what_runs_after_the_context_is_not_seen():
    model, images = models.built("deit"), models.FAMILIES["deit"].images()
    with torch.no_grad(), capture(model) as trace:
        model(images)
    with torch.no_grad():
        model(images)
    assert len(trace.attentions()) == 3


class TestRefusals:
    def test_not_a_module(self):
        with pytest.raises(VitxError, match="found function"), capture(lambda images: images):
            pass

    def test_no_attention(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        with capture(model) as trace:
            model(torch.rand(1, 3, 8, 8))
        with pytest.raises(VitxError, match="no attention between tokens was found"):
            trace.attentions()

    def test_nothing_ran(self):
        with capture(models.built("deit")) as trace:
            pass
        with pytest.raises(VitxError, match="no attention between tokens was found"):
            trace.attentions()

    def test_two_passes(self):
        model, images = models.built("deit"), models.FAMILIES["deit"].images()
        with torch.no_grad(), capture(model) as trace:
            model(images)
            model(images)
        with pytest.raises(VitxError, match="2 forward passes"):
            trace.attentions()

    def test_gradients_that_were_not_captured(self):
        model = models.built("deit")
        with capture(model) as trace:
            output = model(models.FAMILIES["deit"].images())
        with pytest.raises(VitxError, match="captured without gradients"):
            trace.gradients(score_of(output))

    def test_gradients_of_something_else(self):
        model = models.built("deit")
        with capture(model, gradients=True) as trace:
            model(models.FAMILIES["deit"].images())
        with pytest.raises(VitxError, match="does not depend on any attention"):
            trace.gradients(torch.ones(()))

    @pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
    def test_multi_head_attention_with_added_keys(self, options):
        layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
        tokens = torch.rand(1, 5, 8)
        with capture(layer) as trace:
            layer(tokens, tokens, tokens)
        with pytest.raises(
            VitxError, match=r"not one N x N matrix .*: \[\(1, 5, 6\)\]\): use vitx.explain$"
        ) as error:
            trace.attentions()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deit", "siglip", "hf vit, sdpa", "torchvision"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_of_a_pass_without_autograd(name, mode):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with mode(), capture(model, gradients=True) as trace:
        score = score_of(model(images))
    assert not score.requires_grad
    assert close(trace.attentions(), wanted.attentions)
    assert close(trace.gradients(score), wanted.gradients)


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_that_is_called_by_keyword(grad):
    model = models.built("hf vit, sdpa", torch.float64)
    images = models.FAMILIES["hf vit, sdpa"].images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with torch.set_grad_enabled(grad), capture(model, gradients=True) as trace:
        score = score_of(model(pixel_values=images))
    assert trace.passes == 1
    assert close(trace.attentions(), wanted.attentions)
    assert close(trace.gradients(score), wanted.gradients)


def test_a_score_of_several_outputs():
    """One of the outputs is computed from the other two."""
    name = "hf distilled deit, sdpa"
    model, images = models.built(name, torch.float64), models.FAMILIES[name].images(dtype=torch.float64)
    with capture(model, gradients=True) as trace:
        out = model(images)
        score = (out.logits[:, 1] + 2 * out.cls_logits[:, 0] - out.distillation_logits[:, 3]).sum()
    found = trace.gradients(score)
    eager = models.built("hf distilled deit, eager", torch.float64)
    wanted = oracle.observe(eager, images, lambda logits: logits[:, 1], "plain")
    twin = visible.visible_twin(eager)
    with torch.enable_grad(), visible.softmaxes() as softmaxes:
        out = twin(images)
    score = (out.logits[:, 1] + 2 * out.cls_logits[:, 0] - out.distillation_logits[:, 3]).sum()
    square = [a for a in softmaxes if a.shape[-1] == a.shape[-2]]
    assert close(found, torch.autograd.grad(score, square))
    assert close(trace.attentions(), wanted.attentions)


class TestPrinted:
    """`print(trace)`, the first thing to look at when a map is surprising."""

    def test_lists_the_steps(self):
        model, images = models.built("deit"), models.FAMILIES["deit"].images()
        with torch.no_grad(), capture(model) as trace:
            model(images)
        head, *rows = str(trace).splitlines()
        assert head.split() == ["step", "module", "operator", "output", "relevance"]
        assert len(rows) == len(trace.tape.steps)
        assert [int(row.split()[0]) for row in rows] == list(range(len(rows)))
        assert rows[0].split()[-7:] == ["2", "x", "48", "x", "4", "x", "4"]
        assert sum("_scaled_dot_product" in row for row in rows) == 3
        assert rows[-1].split()[-3:] == ["2", "x", str(models.CLASSES)]
        assert not any(row != row.rstrip() for row in rows)

    def test_an_empty_one(self):
        with capture(models.built("deit")) as trace:
            pass
        assert str(trace).split() == ["step", "module", "operator", "output", "relevance"]
