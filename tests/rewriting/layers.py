"""Ways to write norms, linear layers, activations and MLPs. The plain way comes first."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.rewriting.function import EPS, HIDDEN, REAL, WIDTH


def centered(x):
    return x - x.mean(-1, keepdim=True)


def in_place_norm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    x /= x.pow(2).mean(-1, keepdim=True).add_(EPS).sqrt_()
    return x.mul_(w).add_(b)


def norm_by_moments(x, w, b):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * ((x * x).mean(-1, keepdim=True) - mean * mean + EPS).rsqrt() * w + b


def norm_by_var_mean(x, w, b):
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS) * w + b


def norm_by_std_mean(x, w, b):
    std, mean = torch.std_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) / (std.square() + EPS).sqrt() * w + b


def as_one(norm):
    """Normalize each token as a group of its own."""
    return lambda x, w, b: norm(x.flatten(0, 1), w, b).view_as(x)


def kept_mean():
    """Return the matrix that subtracts the mean."""
    return torch.eye(WIDTH, dtype=REAL) - 1 / WIDTH


NORM = {
    "F.layer_norm": lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS),
    "weights afterwards": lambda x, w, b: F.layer_norm(x, (WIDTH,), None, None, EPS) * w + b,
    "native_layer_norm": lambda x, w, b: torch.native_layer_norm(x, (WIDTH,), w, b, EPS)[0],
    "mean of squares": lambda x, w, b: (
        centered(x) / torch.sqrt((centered(x) ** 2).mean(-1, keepdim=True) + EPS) * w + b
    ),
    "var": lambda x, w, b: (
        w * ((x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()) + b
    ),
    "rsqrt": lambda x, w, b: w * (centered(x) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS)) + b,
    "power": lambda x, w, b: (
        (x - x.mean(2, True)) * (x.var(2, correction=0, keepdim=True) + EPS) ** -0.5 * w + b
    ),
    "reciprocal": lambda x, w, b: (
        centered(x) * (x.var(-1, correction=0, keepdim=True) + EPS).sqrt().reciprocal() * w + b
    ),
    "addcmul": lambda x, w, b: torch.addcmul(
        b, centered(x) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt(), w
    ),
    "var_mean": norm_by_var_mean,
    "std_mean": norm_by_std_mean,
    "moments": norm_by_moments,
    "in place": in_place_norm,
    "a length": lambda x, w, b: (
        centered(x) / (centered(x).norm(dim=-1, keepdim=True) ** 2 / WIDTH + EPS).sqrt() * w + b
    ),
    "vector_norm": lambda x, w, b: (
        centered(x)
        * (torch.linalg.vector_norm(centered(x), dim=-1, keepdim=True).square() / WIDTH + EPS).rsqrt()
        * w
        + b
    ),
    "sum of squares": lambda x, w, b: (
        (x - x.sum(-1, True) / WIDTH) / ((centered(x).square().sum(-1, True)) / WIDTH + EPS).sqrt() * w + b
    ),
    "rms_norm of what is centered": lambda x, w, b: F.rms_norm(centered(x), (WIDTH,), w, EPS) + b,
    "group_norm": as_one(lambda x, w, b: F.group_norm(x, 1, w, b, EPS)),
    "instance_norm": as_one(lambda x, w, b: F.instance_norm(x[None], eps=EPS)[0] * w + b),
    "a matrix that centers": lambda x, w, b: (
        (x @ kept_mean()) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt() * w + b
    ),
    "token by token": lambda x, w, b: torch.stack(
        [F.layer_norm(one, (WIDTH,), w, b, EPS) for one in x.unbind(1)], 1
    ),
    "einsum of itself": lambda x, w, b: (
        centered(x)
        * (torch.einsum("bnc,bnc->bn", centered(x), centered(x)) / WIDTH + EPS).rsqrt()[..., None]
        * w
        + b
    ),
    "matmul of itself": lambda x, w, b: (
        centered(x) / ((centered(x)[..., None, :] @ centered(x)[..., None])[..., 0] / WIDTH + EPS).sqrt() * w
        + b
    ),
    "by two letters": lambda x, w, b: F.layer_norm(
        x.unflatten(-1, (4, -1)), (4, WIDTH // 4), w.view(4, -1), b.view(4, -1), EPS
    ).flatten(2),
}


def written_out(call, x, width):
    """Return a preallocated tensor after `call` has written into it."""
    made = x.new_empty(*x.shape[:-1], width)
    call(made)
    return made


LINEAR = {
    "F.linear": F.linear,
    "matmul": lambda x, w, b: x @ w.T + b,
    "matmul, in place": lambda x, w, b: torch.matmul(x, w.t()).add_(b),
    "weights on the left": lambda x, w, b: (w @ x.mT).mT + b,
    "weights on the left, bias on its side": lambda x, w, b: (torch.matmul(w, x.mT) + b[:, None]).mT,
    "einsum": lambda x, w, b: torch.einsum("bnc,dc->bnd", x, w) + b,
    "einsum, weights first": lambda x, w, b: torch.einsum("dc,...c->...d", w, x) + b,
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([-1], [1])) + b,
    "inner": lambda x, w, b: torch.inner(x, w) + b,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.T).unflatten(0, x.shape[:2]) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w.T).view(*x.shape[:2], -1),
    "addmm with factors": lambda x, w, b: torch.addmm(
        2 * b, x.flatten(0, 1), w.T, beta=0.5, alpha=1.0
    ).unflatten(0, x.shape[:2]),
    "bmm": lambda x, w, b: torch.bmm(x, w.T.expand(len(x), -1, -1)) + b,
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.T[None].expand(len(x), -1, -1)),
    "addmv": lambda x, w, b: torch.stack(
        [torch.stack([torch.addmv(b, w, token) for token in one]) for one in x]
    ),
    "multiply and sum": lambda x, w, b: (x.unsqueeze(-2) * w).sum(-1) + b,
    "conv1d": lambda x, w, b: F.conv1d(x.mT, w[:, :, None], b).mT,
    "conv2d": lambda x, w, b: F.conv2d(x.mT[..., None], w[:, :, None, None], b).squeeze(-1).mT,
    "token by token": lambda x, w, b: torch.stack([F.linear(one, w, b) for one in x.unbind(1)], 1),
    "image by image": lambda x, w, b: torch.stack([torch.addmm(b, one, w.T) for one in x]),
    "input in two halves": lambda x, w, b: x[..., :7] @ w[:, :7].T + x[..., 7:] @ w[:, 7:].T + b,
    "output in two halves": lambda x, w, b: torch.cat(
        [F.linear(x, w[:3], b[:3]), F.linear(x, w[3:], b[3:])], dim=-1
    ),
    "a module": lambda x, w, b: torch.func.functional_call(
        nn.Linear(w.shape[1], len(w), dtype=REAL), {"weight": w, "bias": b}, (x,)
    ),
    "out=": lambda x, w, b: written_out(lambda y: torch.matmul(x, w.T, out=y).add_(b), x, len(w)),
    "out= of addmm": lambda x, w, b: written_out(
        lambda y: torch.addmm(b, x.flatten(0, 1), w.T, out=y.flatten(0, 1)), x, len(w)
    ),
}


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
        "indexed": in_place(lambda h: h.index_put_((h < 0,), torch.zeros((), dtype=h.dtype))),
    },
    "swiglu": {
        "chunk": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        "slices, other order": lambda h: parts(h)[1] * F.silu(parts(h)[0]),
        "in place": swiglu_in_place,
        "sigmoid": lambda h: (parts(h)[0] * parts(h)[0].sigmoid()) * parts(h)[1],
        "einsum": lambda h: torch.einsum("bnc,bnc->bnc", F.silu(parts(h)[0]), parts(h)[1]),
        "addcmul": lambda h: torch.addcmul(torch.zeros((), dtype=h.dtype), F.silu(parts(h)[0]), parts(h)[1]),
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
