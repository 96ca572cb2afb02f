"""Each form of a model has the maps of the plain network: scripted, exported, frozen, rounded."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.modules import Around
from tests.same_function import IMAGES, PATCH, Net, found_maps, frozen, full_matrices, in_shares, off

FORMED = ("rollout", "grad_rollout", "evidence")


class Plainly(nn.Module):
    """A Vision Transformer that can be scripted."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.embed, self.first, self.place, self.head = net.embed, net.first, net.place, net.head
        self.blocks = nn.ModuleList(PlainBlock(net, layer) for layer in range(2))
        self.norm = net.norms[4]

    def embedded(self, images):
        return self.embed(images).flatten(2).transpose(1, 2)

    def forward(self, images):
        tokens = self.embedded(images)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1) + self.place
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


class CutsPatches(Plainly):
    """The same with a linear patch embedding, whose patches are cut out by a reshape."""

    def embedded(self, images):
        rows = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(rows.flatten(3).flatten(1, 2), self.embed.weight.flatten(1), self.embed.bias)


class PlainBlock(nn.Module):
    def __init__(self, net, layer):
        super().__init__()
        self.norm1, self.norm2 = net.norms[layer], net.norms[2 + layer]
        self.qkv, self.out = net.qkv[layer], net.out[layer]
        self.mlp = nn.Sequential(net.up[layer], nn.GELU(), net.down[layer])

    def forward(self, tokens):
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class OwnGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        gate = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx, gradient):
        x, gate = ctx.saved_tensors
        return gradient * (gate + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


class OwnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, weights = ctx.saved_tensors
        slope = gradient @ v.mT
        scores = weights * (slope - (slope * weights).sum(-1, True)) / q.shape[-1] ** 0.5
        return scores @ k, scores.mT @ q, weights.mT @ gradient


class WithFunctions(PlainBlock):
    def forward(self, tokens):
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.out(OwnAttention.apply(*qkv).transpose(1, 2).flatten(2))
        return tokens + self.mlp[2](OwnGelu.apply(self.mlp[0](self.norm2(tokens))))


def traced():
    with torch.no_grad():
        return torch.jit.trace(Plainly().eval(), IMAGES, check_trace=False)


def made_in_inference_mode():
    with torch.inference_mode():
        return Plainly().eval()


def without_gradients(block, tokens):
    with torch.no_grad():
        return block(tokens)


def in_inference_mode(block, tokens):
    with torch.inference_mode():
        return block(tokens)


def all_blocks(change):
    def made():
        model = Plainly().eval()
        model.blocks = nn.ModuleList(change(block) for block in model.blocks)
        return model.eval()

    return made


def inside(how):
    return all_blocks(lambda block: Around(how, block))


def with_functions():
    model = Plainly()
    net = Net()
    model.blocks = nn.ModuleList(WithFunctions(net, layer) for layer in range(2))
    return model.eval()


class SwappedIn(nn.Module):
    """A model with plain tensors as its weights, which are not part of the explained module."""

    def __init__(self, kind=Plainly):
        super().__init__()
        model = kind().eval()
        self.run = [model]
        self.held = {name: one.detach().clone() for name, one in model.named_parameters()}

    def forward(self, images):
        return torch.func.functional_call(self.run[0], self.held, (images,))


def scripted_part(block):
    block.mlp = torch.jit.script(block.mlp)
    return block


class Named(torch.Tensor):
    """A subclass whose `__torch_function__` wraps all results, as those of MONAI and fastai do."""


def with_named_weights():
    model = Plainly().eval()
    for module in model.modules():
        for name, one in module._parameters.items():
            if one is not None:
                module._parameters[name] = nn.Parameter(one.detach().as_subclass(Named))
    return model


FORMS = {
    "as it is": lambda: Plainly().eval(),
    "in training mode": lambda: Plainly().train(),
    "frozen parameters": lambda: frozen(Plainly().eval()),
    "traced": traced,
    "traced and frozen": lambda: torch.jit.freeze(traced()),
    "exported": lambda: torch.export.export(Plainly().eval(), (IMAGES,)).module(),
    "scripted": lambda: torch.jit.script(Plainly().eval()),
    "scripted and frozen": lambda: torch.jit.freeze(torch.jit.script(Plainly().eval())),
    "scripted blocks": all_blocks(torch.jit.script),
    "scripted MLPs": all_blocks(scripted_part),
    "made in inference mode": made_in_inference_mode,
    "no_grad inside": inside(without_gradients),
    "inference_mode inside": inside(in_inference_mode),
    "checkpoints": inside(lambda block, t: checkpoint(block, t, use_reentrant=False)),
    "reentrant checkpoints": inside(lambda block, t: checkpoint(block, t, use_reentrant=True)),
    "functions of one's own": with_functions,
    "weights of a subclass": with_named_weights,
    "a subclass inside": inside(lambda block, t: block(t.as_subclass(Named)).as_subclass(torch.Tensor)),
    "detached": inside(lambda block, t: block(t).detach()),
    "weights swapped in": lambda: SwappedIn().eval(),
    "weights swapped in, patches cut by a reshape": lambda: SwappedIn(CutsPatches).eval(),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_model_changes_nothing(name):
    """Each form computes the plain network, and its maps are those of full matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FORMS[name]()
        logits, wanted = full_matrices(Net())
        with torch.no_grad():
            assert torch.allclose(model(IMAGES), logits, rtol=0, atol=1e-9)
        far = off(found_maps(model, FORMED), in_shares(wanted))
    assert max(far.values()) < 1e-6, far


def autocast_inside(kind):
    def run(block, tokens):
        with torch.autocast("cpu", kind):
            return block(tokens)

    return lambda: inside(run)().float()


def quantized():
    return torch.ao.quantization.quantize_dynamic(Plainly().eval().float(), {nn.Linear}, dtype=torch.qint8)


# The model, the dtype of its images, and the tolerance of the maps.
ROUGH = {
    "single": (lambda: Plainly().eval().float(), torch.float32, 1e-4),
    "bfloat16": (lambda: Plainly().eval().bfloat16(), torch.bfloat16, 0.1),
    "half": (lambda: Plainly().eval().half(), torch.half, 0.02),
    "autocast to bfloat16": (autocast_inside(torch.bfloat16), torch.float32, 0.1),
    "autocast to half": (autocast_inside(torch.half), torch.float32, 0.02),
    "whole numbers": (quantized, torch.float32, 0.15),
}


@pytest.mark.parametrize("name", ROUGH)
def test_rounding_changes_little(name):
    make, kind, tolerance = ROUGH[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        _, wanted = full_matrices(Net())
        far = off(found_maps(model, FORMED, IMAGES.to(kind)), in_shares(wanted))
    assert max(far.values()) < tolerance, far


def test_autocast_around_the_call():
    with torch.autocast("cpu", torch.bfloat16):
        found = found_maps(Plainly().eval().float(), FORMED, IMAGES.float())
    _, wanted = full_matrices(Net())
    far = off(found, in_shares(wanted))
    assert max(far.values()) < 0.1, far
