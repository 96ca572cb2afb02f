"""What no rule covers is refused in a sentence that names it."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import models
from tests.modules import Around
from tests.plain_vits import DEPTH, HEADS, IMAGES, Attention, Vit, vit
from vitx import VitxError, capture, explain


class Foreign(torch.autograd.Function):
    """A function that leaves torch for NumPy."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def residual(tokens, change):
    return tokens + change


BREAKS = {
    "whole numbers": (lambda x: residual(x, (8 * x).to(torch.int8).double()), "reached to"),
    "a spectrum": (lambda x: residual(x, torch.fft.fft(x).real), "reached real|reached fft"),
    "an unknown function": (lambda x: torch.linalg.qr(x.mT).Q.mT, "reached linalg_qr"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8).dequantize().double(),
        "reached dequantize",
    ),
    "a function of one's own": (Foreign.apply, "does not come from the image|reached"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_no_rule_covers_is_said_by_name(name):
    call, sentence = BREAKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VitxError, match=sentence) as error:
            explain(vit(read=lambda tokens: call(tokens)[:, 0]), IMAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["grad_rollout", "gae"])
def test_what_torch_cannot_differentiate_is_said_by_name(method):
    """The linearized network needs no derivative of such a call; only the plain one does."""
    model = vit(read=lambda tokens: torch.special.bessel_j0(tokens)[:, 0])
    assert explain(model, IMAGES, method).maps.sum() > 0
    with pytest.raises(VitxError, match="the gradient reached special_bessel_j0, which torch cannot diff"):
        explain(model, IMAGES, method, gradient="plain")


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
def test_what_torch_does_not_show_is_no_constant(method):
    """Next to a recorded path, it would otherwise pass for a constant of the model."""
    model = vit(read=lambda tokens: tokens[:, 0] + Foreign.apply(tokens)[:, 0])
    with pytest.raises(VitxError, match="reached code that torch does not show"):
        explain(model, IMAGES, method)


def test_a_call_without_a_rule_that_nothing_reads_is_no_error():
    seen = []
    curious = Around(
        lambda vit, x: seen.append(torch.special.bessel_j0(x).detach().median()) or vit(x), vit()
    )
    assert torch.allclose(explain(curious, IMAGES).maps, explain(vit(), IMAGES).maps)


@pytest.mark.parametrize(
    "after",
    [
        lambda x: x,
        lambda x: x.relu(),
        lambda x: x * x.sigmoid(),
        lambda x: torch.cat([x, x], 1).mean(1, True),
    ],
)
def test_linear_attention_is_refused(after):
    """It is refused however its output is used."""

    def read(tokens):
        return after(tokens.relu() @ (tokens.mT @ tokens)).mean(1)

    with pytest.raises(VitxError, match="linear attention"):
        explain(vit(read=read), IMAGES)


class Cascade(nn.Module):
    """Two attentions, the second of which gets the output of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention("fused"), Attention("fused")

    def forward(self, x):
        return self.second(self.first(x))


def test_an_attention_that_feeds_another_is_multiplied_by_it():
    model = Vit()
    model.layers[1] = Cascade()
    model = models.spread(model).double().eval()
    with capture(model) as trace:
        model(IMAGES)
    first, inner, outer, last = (a.mean(1) for a in trace.attentions())
    found = torch.eye(17, dtype=torch.float64)[:1].expand(len(IMAGES), 1, -1)
    found = (found + found @ last) / 2
    found = (found + found @ outer @ inner) / 2
    found = (found + found @ first) / 2
    assert torch.allclose(explain(model, IMAGES).maps.flatten(1), found[:, 0, 1:], atol=1e-12)


class Overlap(Cascade):
    """Two attentions beside each other, the second of which leaves the class token out."""

    def forward(self, x):
        return self.first(x) + F.pad(self.second(x[:, 1:]), (0, 0, 1, 0))


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (Cascade, "one attention inside a residual feeds another, so their heads cannot be fused"),
        (Overlap, "parallel attentions have some, but not all, of their queries in common"),
    ],
)
def test_attentions_that_are_no_heads_of_one_layer_are_refused(part, sentence):
    model = Vit()
    model.layers[1] = part()
    with pytest.raises(VitxError, match=f"{sentence}.*: take rollout with head_fusion='mean'"):
        explain(models.spread(model).double().eval(), IMAGES, "grad_rollout")


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_flex_attention_is_refused_in_a_sentence(method):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    class Flex(Attention):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(flex.flex_attention(q, k, v).transpose(1, 2).flatten(2))

    model = Vit()
    model.layers = nn.ModuleList(Flex("flex") for _ in range(DEPTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VitxError, match=r"(?i)flex.?attention") as error:
            explain(model, IMAGES.float(), method)
    assert "\n" not in str(error.value)


def test_another_operator_with_inner_steps_is_refused_by_its_name():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = Vit()

        def forward(self, images):
            double = torch.cond(images.sum() > 0, lambda x: 2 * x, lambda x: -x, (images,))
            return self.vit(double)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VitxError, match=r"the model calls cond, .*: replace it for the explanation"):
            explain(Branching().eval(), IMAGES.float(), "rollout")


class SwappedHead(nn.Module):
    """A model with a head whose weights are there only during the pass."""

    def __init__(self):
        super().__init__()
        self.vit = models.deit()
        self.weights = {
            name: 2 * value.detach() for name, value in self.vit.head.named_parameters(prefix="head")
        }

    def forward(self, images):
        return torch.func.functional_call(self.vit, self.weights, (images,))


def test_legrad_refuses_a_head_that_is_another_one_after_the_pass():
    with pytest.raises(VitxError, match="other weights during a pass than after it"):
        explain(SwappedHead().eval(), torch.rand(2, 3, 32, 32), "legrad", target=0)


def test_scripted_code_is_captured_inside_a_module():
    scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(VitxError, match=r"call it in the forward of an nn\.Module"), capture(scripted):
        scripted(torch.rand(2, 3))
