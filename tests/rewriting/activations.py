"""Ways to write activations and MLPs. The plain way comes first."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.rewriting.function import HIDDEN, WIDTH


def in_place(call):
    """Return an activation that writes into its own input, a copy."""
    return lambda h: call(h.clone())


def sigmoid_times(h):
    gate = torch.sigmoid(h)
    gate *= h
    return gate


def quick_out(h):
    return torch.mul(h, torch.sigmoid(1.702 * h), out=torch.empty_like(h))


def cubed(h):
    return math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)


def parts(h):
    return h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]


def swiglu_in_place(h):
    gate, up = h.chunk(2, -1)
    gate = F.silu(gate)
    gate *= up
    return gate


ACTIVATIONS = {
    "erf": {
        "F.gelu": F.gelu,
        "nn.GELU": lambda h: nn.GELU()(h),
        "erf": lambda h: 0.5 * h * (1 + torch.erf(h / math.sqrt(2))),
        "erf, other order": lambda h: h * 0.5 * (torch.erf(h * 2**-0.5) + 1.0),
        "erf, product last": lambda h: ((1 + (h / 2**0.5).erf()) / 2) * h,
        "erf in two terms": lambda h: 0.5 * h + 0.5 * h * torch.erf(h / 2**0.5),
        "erf by addcmul": lambda h: torch.addcmul(0.5 * h, 0.5 * h, torch.erf(h / 2**0.5)),
        "erfc": lambda h: h * torch.erfc(-h / 2**0.5) / 2,
        "ndtr": lambda h: h * torch.special.ndtr(h),
        "a distribution": lambda h: h * torch.distributions.Normal(0.0, 1.0).cdf(h),
        "aten": lambda h: torch.ops.aten.gelu(h),
        "gelu_": in_place(lambda h: torch.ops.aten.gelu_(h)),
        "mul_": in_place(lambda h: h.mul_((1 + torch.erf(h / 2**0.5)) / 2)),
        "in two parts": lambda h: torch.cat([F.gelu(h[..., :3]), F.gelu(h[..., 3:])], -1),
        "less the rest": lambda h: h - h * torch.erfc(h / 2**0.5) / 2,
        "lerp": lambda h: torch.lerp(torch.zeros_like(h), h, (1 + torch.erf(h / 2**0.5)) / 2),
        "divided": lambda h: h / (2 / (1 + torch.erf(h / 2**0.5))),
        "vmap": lambda h: torch.vmap(F.gelu)(h),
    },
    "tanh": {
        "F.gelu, tanh": lambda h: F.gelu(h, approximate="tanh"),
        "nn.GELU, tanh": lambda h: nn.GELU("tanh")(h),
        "tanh": lambda h: 0.5 * h * (1 + torch.tanh(cubed(h))),
        "tanh, a product of three": lambda h: (
            h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))) / 2
        ),
        "tanh, one product inside": lambda h: (
            0.5 * h * (1 + torch.tanh(h * 0.7978845608028654 * (1 + 0.044715 * h * h)))
        ),
        "pow": lambda h: 0.5 * h * (1 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3.0)))),
        "sigmoid": lambda h: h * torch.sigmoid(2 * cubed(h)),
        "two terms": lambda h: h / 2 + h / 2 * cubed(h).tanh(),
    },
    "quick": {
        "silu, scaled": lambda h: F.silu(1.702 * h) / 1.702,
        "sigmoid": lambda h: h * torch.sigmoid(1.702 * h),
        "sigmoid first": lambda h: torch.sigmoid(h * 1.702).mul(h),
        "exp": lambda h: h / (1 + torch.exp(-1.702 * h)),
        "reciprocal of exp": lambda h: h * (1 + (-1.702 * h).exp()).reciprocal(),
        "tanh": lambda h: h * (0.5 + 0.5 * torch.tanh(0.851 * h)),
        "einsum": lambda h: torch.einsum("bnc,bnc->bnc", h, torch.sigmoid(1.702 * h)),
        "out=": quick_out,
        "exp over one and exp": lambda h: h * (1.702 * h).exp() / (1 + (1.702 * h).exp()),
        "softmax of two": lambda h: h * torch.stack([1.702 * h, 0 * h], -1).softmax(-1)[..., 0],
        "softplus": lambda h: h * torch.exp(-F.softplus(-1.702 * h)),
    },
    "silu": {
        "F.silu": F.silu,
        "sigmoid": lambda h: h * h.sigmoid(),
        "sigmoid, in place": sigmoid_times,
        "F.silu, in place": in_place(lambda h: F.silu(h, inplace=True)),
        "exp": lambda h: h / (1 + (-h).exp()),
        "glu": lambda h: F.glu(torch.cat([h, h], -1), -1),
        "logsigmoid": lambda h: h * F.logsigmoid(h).exp(),
    },
    "relu": {
        "F.relu": F.relu,
        "clamp": lambda h: h.clamp(min=0),
        "clamp_min_": in_place(lambda h: h.clamp_min_(0)),
        "maximum": lambda h: torch.maximum(h, torch.zeros((), dtype=h.dtype)),
        "a mask": lambda h: h * (h > 0),
        "where": lambda h: torch.where(h > 0, h, 0),
        "masked_fill": lambda h: h.masked_fill(h < 0, 0),
        "threshold": lambda h: F.threshold(h, 0.0, 0.0),
        "half of two": lambda h: (h + h.abs()) / 2,
        "sign": lambda h: h * (1 + torch.sign(h)) / 2,
        "less the minimum": lambda h: h - torch.minimum(h, torch.zeros_like(h)),
        "and its opposite": lambda h: h + F.relu(-h),
        "a root": lambda h: (h + torch.sqrt(h * h)) / 2,
        "indexed": in_place(lambda h: h.index_put_((h < 0,), torch.zeros((), dtype=h.dtype))),
    },
    "swiglu": {
        "chunk": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        "slices, other order": lambda h: parts(h)[1] * F.silu(parts(h)[0]),
        "in place": swiglu_in_place,
        "sigmoid": lambda h: (parts(h)[0] * parts(h)[0].sigmoid()) * parts(h)[1],
        "einsum": lambda h: torch.einsum("bnc,bnc->bnc", F.silu(parts(h)[0]), parts(h)[1]),
        "addcmul": lambda h: torch.addcmul(torch.zeros((), dtype=h.dtype), F.silu(parts(h)[0]), parts(h)[1]),
        "both first": lambda h: (parts(h)[1] * parts(h)[0]) * parts(h)[0].sigmoid(),
        "the gate first": lambda h: (parts(h)[1] * parts(h)[0].sigmoid()) * parts(h)[0],
        "divided": lambda h: parts(h)[1] * parts(h)[0] / (1 + (-parts(h)[0]).exp()),
        "unbind": lambda h: (lambda two: F.silu(two[0]) * two[1])(h.unflatten(-1, (2, -1)).unbind(-2)),
    },
}  # fmt: skip


def some_channels(w, own, doubled):
    """Return the rows of an MLP's first layer that produce some of its hidden channels."""
    return torch.cat([half[own] for half in w.chunk(2)]) if doubled else w[own]


def by_channels(x, w, b, v, c, up, act, down, doubled):
    terms = []
    for own, bias in ((slice(0, 11), c), (slice(11, HIDDEN), torch.zeros_like(c))):
        hidden = act(up(x, some_channels(w, own, doubled), some_channels(b, own, doubled)))
        terms.append(F.linear(hidden, v[:, own]) + bias)
    return terms


# From x to the terms of the branch.
MLP = {
    "in one": lambda x, w, b, v, c, up, act, down, doubled: [down(act(up(x, w, b)), v, c)],
    "hidden channels in two parts": lambda *args: [sum(by_channels(*args))],
    "hidden channels in two parts, two terms": by_channels,
    "the class token apart": lambda x, w, b, v, c, up, act, down, doubled: [
        torch.cat([down(act(up(part, w, b)), v, c) for part in (x[:, :1], x[:, 1:])], 1)
    ],
    "channels in front": lambda x, w, b, v, c, up, act, down, doubled: [
        down(act(F.conv1d(x.mT, w[:, :, None], b).mT), v, c)
    ],
    "the tokens as one batch": lambda x, w, b, v, c, up, act, down, doubled: [
        down(act(up(x.reshape(1, -1, WIDTH), w, b)), v, c).view_as(x)
    ],
}
