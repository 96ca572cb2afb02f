"""Constants that the model changes, frees or swaps during the pass: each counts as it was in its call."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import models
from tests.blocks import PASSES
from vitx import explain
from vitx.explaining import explain_methods

IMAGES = models.FAMILIES["deit"].images().double()
DOUBLE = torch.float64


def linear_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]


class Streamed(nn.Module):
    """A linear layer whose weight is copied into memory that all layers share."""

    def __init__(self, layer, buffer, kind):
        super().__init__()
        self.source, self.bias = [layer.weight.detach()], layer.bias
        if kind == "buffer":
            self.register_buffer("memory", buffer)
        elif kind == "parameter":
            self.memory = nn.Parameter(buffer, requires_grad=False)
        else:
            self.given = [buffer]

    def forward(self, x):
        (source,) = self.source
        memory = self.given[0] if hasattr(self, "given") else self.memory
        weight = memory.data[: source.numel()].view_as(source)
        return F.linear(x, weight.copy_(source), self.bias)


def streamed(kind):
    def change(model):
        layers = linear_layers(model)
        memory = torch.zeros(max(layer.weight.numel() for _, layer in layers), dtype=DOUBLE)
        for name, layer in layers:
            model.set_submodule(name, Streamed(layer, memory, kind))

    return change


def loaded(before, after):
    """Load the weight of each linear layer before it runs, and free it afterwards."""

    def change(model):
        for _, layer in linear_layers(model):
            source = layer.weight.detach().clone()
            layer.register_forward_pre_hook(lambda m, _, source=source: before(m, source))
            layer.register_forward_hook(lambda m, *_: after(m))
            after(layer)

    return change


def filled(layer, source):
    layer.weight.data.copy_(source)


def emptied(layer):
    layer.weight.data.zero_()


def given(layer, source):
    layer.weight.data = source.clone()


def freed(layer):
    layer.weight.data = torch.zeros(0, dtype=DOUBLE)


CHANGES = {
    **{f"streamed through a {kind}": streamed(kind) for kind in ("buffer", "parameter", "tensor")},
    "zeroed": loaded(filled, emptied),
    "freed": loaded(given, freed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_are_there_only_while_a_layer_runs(change):
    """As in offloading and sharding: all maps are those of the model that keeps its weights."""
    model = models.deit().eval().to(DOUBLE)
    other = copy.deepcopy(model)
    CHANGES[change](other)
    for methods in PASSES:
        wanted, found = (explain_methods(one, IMAGES, methods, target=[0, 1]) for one in (model, other))
        for name, one in wanted.items():
            assert torch.allclose(found[name].maps, one.maps, rtol=0, atol=1e-9), name


USES = {
    "a product": lambda x, c: x * c,
    "a quotient": lambda x, c: x / c,
    "a sum with a factor": lambda x, c: torch.addcmul(x, x, c),
    "a blend": lambda x, c: torch.lerp(x, 2 * x, c),
    "a norm": lambda x, c: F.layer_norm(x, c.shape, c),
    "a matrix": lambda x, c: x @ torch.diag(c),
}


class Scaled(nn.Module):
    """A ViT whose blocks use a constant in some way; `refilled` for each block, or each with its own."""

    def __init__(self, use, refilled):
        super().__init__()
        self.vit, self.use, self.refilled = models.deit(), use, refilled
        width = self.vit.embed_dim
        self.register_buffer("shared", torch.ones(width))
        for number, block in enumerate(self.vit.blocks):
            factors = torch.linspace(0.5, 1.5 + number, width)
            block.attn.register_forward_hook(lambda _, __, out, f=factors: self.scaled(out, f))

    def forward(self, images):
        return self.vit(images)

    def scaled(self, out, factors):
        factors = factors.to(out)
        return self.use(out, self.shared.zero_().add_(factors) if self.refilled else factors.clone())


@pytest.mark.parametrize("use", USES)
def test_a_buffer_that_is_refilled_for_each_layer(use):
    maps = []
    for refilled in (False, True):
        torch.manual_seed(0)
        model = Scaled(USES[use], refilled).eval().to(DOUBLE)
        maps.append([explain_methods(model, IMAGES, methods, target=0) for methods in PASSES])
    for own, shared in zip(*maps, strict=True):
        for name, one in own.items():
            assert torch.allclose(shared[name].maps, one.maps, rtol=0, atol=1e-9), name


def test_probabilities_that_are_changed_in_place():
    """The gradient of a softmax is that of its own output."""

    class Reweighted(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.vit, self.in_place = models.built("deit", DOUBLE), in_place

        def forward(self, images):
            found = self.vit(images).softmax(-1)
            factors = torch.arange(1, found.shape[1] + 1).to(found)
            return found.mul_(factors) if self.in_place else found * factors

    plain, in_place = (
        explain(Reweighted(one), IMAGES, "grad_rollout", target=lambda out: out[:, 0] - out[:, 1]).maps
        for one in (False, True)
    )
    assert torch.allclose(plain, in_place, rtol=0, atol=1e-12)


def test_a_parameter_that_the_pass_writes_into_is_restored():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = models.built("deit")
            self.mean = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, images):
            self.mean.mul_(0.9)
            self.mean[0] += 1
            return self.vit(images)

    model = Counting().eval()
    for _ in range(2):
        explain(model, IMAGES.float(), "grad_rollout", target=0)
        assert torch.equal(model.mean, torch.ones(3))
