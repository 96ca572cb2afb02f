"""Ways to write norms and linear layers. The plain way comes first."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.rewriting.function import EPS, REAL, WIDTH


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


def norm_by_ones(x, w, b):
    ones = torch.ones(WIDTH, WIDTH, dtype=REAL) / WIDTH
    x = x - x @ ones
    return x / ((x * x) @ ones + EPS).sqrt() * w + b


def norm_by_linear(x, w, b):
    ones = torch.ones(1, WIDTH, dtype=REAL) / WIDTH
    x = x - F.linear(x, ones)
    return x / torch.sqrt(F.linear(x**2, ones) + EPS) * w + b


def norm_by_offset(x, w, b):
    scale = (x.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    return x * (w * scale) + (b - x.mean(-1, True) * w * scale)


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
    "a matrix of ones": norm_by_ones,
    "linear layers of ones": norm_by_linear,
    "a scale and an offset": norm_by_offset,
    "a logarithm": lambda x, w, b: (
        centered(x) * torch.exp(-0.5 * torch.log(x.var(-1, correction=0, keepdim=True) + EPS)) * w + b
    ),
    "a hypotenuse": lambda x, w, b: (
        centered(x) / torch.hypot(x.std(-1, correction=0, keepdim=True), torch.tensor(EPS**0.5).to(x)) * w + b
    ),
    "the mean less x": lambda x, w, b: (
        -(x.mean(-1, keepdim=True) - x) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt() * w + b
    ),
    "vmap": lambda x, w, b: torch.vmap(torch.vmap(lambda t: F.layer_norm(t, (WIDTH,), w, b, EPS)))(x),
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


def with_ones(x, w, b):
    """Return the input with a channel of ones, and the weights with the bias as a column."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1), torch.cat([w, b[:, None]], 1)


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
    "subtracted": lambda x, w, b: b - x @ (-w).T,
    "mean of products": lambda x, w, b: (x.unsqueeze(-2) * w).mean(-1) * x.shape[-1] + b,
    "conv_transpose1d": lambda x, w, b: F.conv_transpose1d(x.mT, w.T[..., None], b).mT,
    "vmap": lambda x, w, b: torch.vmap(torch.vmap(lambda token: w @ token + b))(x),
    "a module": lambda x, w, b: torch.func.functional_call(
        nn.Linear(w.shape[1], len(w), dtype=REAL), {"weight": w, "bias": b}, (x,)
    ),
    "out=": lambda x, w, b: written_out(lambda y: torch.matmul(x, w.T, out=y).add_(b), x, len(w)),
    "out= of addmm": lambda x, w, b: written_out(
        lambda y: torch.addmm(b, x.flatten(0, 1), w.T, out=y.flatten(0, 1)), x, len(w)
    ),
}


FAR_LINEAR = {
    "outer products": lambda x, w, b: sum(one[..., None] * w[:, i] for i, one in enumerate(x.unbind(-1))) + b,
    "inputs reversed": lambda x, w, b: F.linear(x.flip(-1), w.flip(1), b),
    "outputs reversed": lambda x, w, b: F.linear(x, w.flip(0), b.flip(0)).flip(-1),
    "a channel of ones": lambda x, w, b: F.linear(*with_ones(x, w, b)),
    "padded with ones": lambda x, w, b: F.pad(x, (0, 1), value=1.0) @ with_ones(x, w, b)[1].T,
    "cosines": lambda x, w, b: (
        F.cosine_similarity(x.unsqueeze(-2), w, dim=-1) * x.norm(dim=-1, keepdim=True) * w.norm(dim=1) + b
    ),
}
