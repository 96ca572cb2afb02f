"""One small Vision Transformer, written in many ways that all compute the same function.

A `Function` says what is computed, a `Written` network how: it names a spelling for each of its sites. The
first spelling of a kind is the plain one. `expected` returns the maps computed from full matrices.

        python -m tests.rewriting N SEED    N random mixtures: a tally, and the spellings to blame
        python -m tests.rewriting singles   each spelling alone
"""

import collections
import functools
import math
import random
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from tests import oracle
from vitx import VitxError, explain_methods

WIDTH, HIDDEN, CLASSES, BATCH = 24, 20, 5, 2
IMAGE, PATCH = 16, 4
SIDE = IMAGE // PATCH
PATCHES, COUNT = SIDE**2, SIDE**2 + 1
EPS = 1e-6
TARGET = [1, 3]
REAL = torch.float64


@dataclass(frozen=True)
class Function:
    """The function to compute, regardless of how it is spelled.

    Attributes:
        forms: for each block "serial" (an attention, then an MLP), "beside" (an attention beside an MLP),
            "twins" (two attentions beside each other, then an MLP) or "all" (all three beside each other).
        activation: of the MLP: "erf", "tanh", "quick", "silu", "relu" or "swiglu".
        read: "token" (the class token) or "patches" (their mean).
        heads: of each attention.
    """

    forms: tuple[str, ...] = ("serial", "serial")
    activation: str = "erf"
    read: str = "token"
    heads: int = 3


# ---- spellings of each site, the plain one first ----------------------------------------------------------


def blocks(x):
    """View images as patches, (B, 3, rows, PATCH, columns, PATCH)."""
    return x.reshape(len(x), 3, SIDE, PATCH, SIDE, PATCH)


def corners():
    return [(PATCH * row, PATCH * column) for row in range(SIDE) for column in range(SIDE)]


def cut(x):
    """Slice out each patch, (B, patches, 3 * PATCH * PATCH)."""
    patches = [x[:, :, top : top + PATCH, left : left + PATCH].flatten(1) for top, left in corners()]
    return torch.stack(patches, 1)


EMBED = {
    "conv2d": lambda x, w, b: F.conv2d(x, w, b, stride=PATCH).flatten(2).transpose(1, 2),
    "conv2d, channels last": lambda x, w, b: F.conv2d(x, w, b, PATCH).permute(0, 2, 3, 1).flatten(1, 2),
    "conv2d without its bias": lambda x, w, b: F.conv2d(x, w, None, PATCH).flatten(2).mT + b,
    "conv2d, color by color": lambda x, w, b: (
        sum(F.conv2d(x[:, [c]], w[:, [c]], None, PATCH) for c in range(3)).flatten(2).mT + b
    ),
    "conv2d, row by row": lambda x, w, b: torch.cat(
        [F.conv2d(part, w, b, PATCH).flatten(2) for part in x.split(PATCH, 2)], 2
    ).transpose(1, 2),
    "conv3d": lambda x, w, b: F.conv3d(x[:, :, None], w[:, :, None], b, (1, PATCH, PATCH)).flatten(2).mT,
    "F.unfold": lambda x, w, b: F.linear(F.unfold(x, PATCH, stride=PATCH).mT, w.flatten(1), b),
    "Tensor.unfold": lambda x, w, b: F.linear(
        x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2),
        *(w.flatten(1), b),
    ),
    "view and permute": lambda x, w, b: (
        blocks(x).permute(0, 2, 4, 1, 3, 5).reshape(len(x), PATCHES, -1) @ w.flatten(1).T + b
    ),
    "einsum": lambda x, w, b: torch.einsum("bcipjq,dcpq->bijd", blocks(x), w).flatten(1, 2) + b,
    "tensordot": lambda x, w, b: torch.tensordot(blocks(x), w, ([1, 3, 5], [1, 2, 3])).flatten(1, 2) + b,
    "pixel_unshuffle": lambda x, w, b: (
        F.conv2d(F.pixel_unshuffle(x, PATCH), w.flatten(1)[:, :, None, None], b).flatten(2).mT
    ),
    "slices": lambda x, w, b: F.linear(cut(x), w.flatten(1), b),
    "slice by slice": lambda x, w, b: torch.stack(
        [
            torch.addmm(b, x[:, :, top : top + PATCH, left : left + PATCH].flatten(1), w.flatten(1).T)
            for top, left in corners()
        ],
        dim=1,
    ),
    "as_strided": lambda x, w, b: F.linear(
        x.contiguous()
        .as_strided(
            (len(x), SIDE, SIDE, 3, PATCH, PATCH),
            (3 * IMAGE * IMAGE, PATCH * IMAGE, PATCH, IMAGE * IMAGE, IMAGE, 1),
        )
        .reshape(len(x), PATCHES, -1),
        *(w.flatten(1), b),
    ),
    "index": lambda x, w, b: F.linear(
        x.flatten(2)[:, :, pixel_numbers()].transpose(1, 2).flatten(2), w.flatten(1), b
    ),
}


def pixel_numbers():
    """Return the pixel indices of each patch, (patches, PATCH * PATCH)."""
    pixels = torch.arange(IMAGE * IMAGE).view(SIDE, PATCH, SIDE, PATCH)
    return pixels.transpose(1, 2).reshape(PATCHES, -1)


def assigned(x, first, place):
    tokens = x.new_zeros(len(x), COUNT, WIDTH)
    tokens[:, :1] = first
    tokens[:, 1:] = x
    return tokens + place


def copied(x, first, place):
    tokens = torch.empty(len(x), COUNT, WIDTH, dtype=x.dtype)
    tokens[:, 0].copy_(first[0, 0])
    tokens[:, 1:].copy_(x)
    tokens += place
    return tokens


def put(x, first, place):
    tokens = place.repeat(len(x), 1, 1)
    where = torch.arange(1, COUNT)
    rows = torch.arange(len(x))
    tokens.index_put_((rows[:, None], where[None]), x, accumulate=True)
    tokens[:, 0] += first[0, 0]
    return tokens


def shift():
    """Return a (tokens, patches) matrix that moves each patch one place further."""
    return torch.eye(COUNT, dtype=REAL)[:, 1:]


def is_first():
    return torch.arange(COUNT) == 0


TOKENS = {
    "cat, expand": lambda x, first, place: torch.cat([first.expand(len(x), -1, -1), x], 1) + place,
    "cat, repeat": lambda x, first, place: place + torch.cat((first.repeat(len(x), 1, 1), x), dim=1),
    "hstack": lambda x, first, place: torch.hstack([first.expand(len(x), -1, -1), x]).add(place),
    "cat of sums": lambda x, first, place: torch.cat(
        [(first + place[:, :1]).expand(len(x), -1, -1), x + place[:, 1:]], 1
    ),
    "cat, roll": lambda x, first, place: torch.cat([x, first.expand(len(x), -1, -1)], 1).roll(1, 1) + place,
    "cat, flip": lambda x, first, place: (
        torch.cat([x.flip(1), first.expand(len(x), -1, -1)], 1).flip(1) + place
    ),
    "stack": lambda x, first, place: torch.stack([first[:, 0].expand(len(x), -1), *x.unbind(1)], 1) + place,
    "slices assigned": assigned,
    "copy_ into slices": copied,
    "index_put_, accumulated": put,
    "pad": lambda x, first, place: F.pad(x, (0, 0, 1, 0)) + (place + F.pad(first, (0, 0, 0, PATCHES))),
    "index_copy": lambda x, first, place: (
        first.expand(len(x), COUNT, -1).index_copy(1, torch.arange(1, COUNT), x) + place
    ),
    "index_add": lambda x, first, place: (
        (place + F.pad(first, (0, 0, 0, PATCHES)))
        .expand(len(x), -1, -1)
        .index_add(1, torch.arange(1, COUNT), x)
    ),
    "scatter": lambda x, first, place: (
        first.repeat(len(x), COUNT, 1).scatter(
            1, torch.arange(1, COUNT)[None, :, None].expand(len(x), -1, WIDTH), x
        )
        + place
    ),
    "masked_scatter": lambda x, first, place: (
        first.repeat(len(x), COUNT, 1).masked_scatter(~is_first()[:, None].expand(len(x), -1, WIDTH), x)
        + place
    ),
    "slice_scatter": lambda x, first, place: (
        torch.slice_scatter(first.repeat(len(x), COUNT, 1), x, 1, start=1) + place
    ),
    "where": lambda x, first, place: torch.where(is_first()[:, None], first, F.pad(x, (0, 0, 1, 0))) + place,
    "a matrix that shifts": lambda x, first, place: (
        torch.matmul(shift(), x) + (place + F.pad(first, (0, 0, 0, PATCHES)))
    ),
    "an einsum that shifts": lambda x, first, place: (
        torch.einsum("tn,bnc->btc", shift(), x) + is_first().to(x)[:, None] * first + place
    ),
}


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


def split_heads(x, heads):
    """Split the channels into heads, (B, heads, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def each(make, w, b):
    """Return queries, keys and values, each computed with its own weights."""
    return [make(weight, bias) for weight, bias in zip(w.chunk(3), b.chunk(3), strict=True)]


def split_three(x):
    return x[..., :WIDTH], x[..., WIDTH : 2 * WIDTH], x[..., 2 * WIDTH :]


PROJECT = {
    "permute, unbind": lambda x, w, b, linear, heads: (
        linear(x, w, b).reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    ),
    "permute, index": lambda x, w, b, linear, heads: [
        linear(x, w, b).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)[i] for i in range(3)
    ],
    "movedim": lambda x, w, b, linear, heads: [
        part.movedim(2, 1) for part in linear(x, w, b).unflatten(-1, (3, heads, -1)).movedim(2, 0)
    ],
    "select": lambda x, w, b, linear, heads: [
        linear(x, w, b).view(*x.shape[:2], 3, heads, -1).select(2, i).swapaxes(1, 2) for i in range(3)
    ],
    "chunk": lambda x, w, b, linear, heads: [
        split_heads(part, heads) for part in linear(x, w, b).chunk(3, -1)
    ],
    "split": lambda x, w, b, linear, heads: [
        split_heads(part, heads) for part in linear(x, w, b).split([WIDTH] * 3, -1)
    ],
    "slices": lambda x, w, b, linear, heads: [
        split_heads(part, heads).contiguous() for part in split_three(linear(x, w, b))
    ],
    "narrow": lambda x, w, b, linear, heads: [
        split_heads(linear(x, w, b).narrow(-1, i * WIDTH, WIDTH), heads) for i in range(3)
    ],
    "as_strided": lambda x, w, b, linear, heads: [
        linear(x, w, b)
        .contiguous()
        .as_strided(
            (len(x), heads, x.shape[1], WIDTH // heads),
            (3 * WIDTH * x.shape[1], WIDTH // heads, 3 * WIDTH, 1),
            i * WIDTH,
        )
        for i in range(3)
    ],
    "separate weights": lambda x, w, b, linear, heads: each(
        lambda p, c: split_heads(linear(x, p, c), heads), w, b
    ),
    "values apart": lambda x, w, b, linear, heads: [
        split_heads(part, heads)
        for part in (
            *linear(x, w[: 2 * WIDTH], b[: 2 * WIDTH]).chunk(2, -1),
            linear(x, w[2 * WIDTH :], b[2 * WIDTH :]),
        )
    ],
    "einsum, a matrix for each head": lambda x, w, b, linear, heads: each(
        lambda p, c: torch.einsum("bnc,hdc->bhnd", x, p.unflatten(0, (heads, -1))) + c.view(heads, 1, -1),
        *(w, b),
    ),
    "one einsum": lambda x, w, b, linear, heads: (
        torch.einsum("bnc,khdc->kbhnd", x, w.view(3, heads, -1, WIDTH)) + b.view(3, 1, heads, 1, -1)
    ).unbind(),
    "tensordot": lambda x, w, b, linear, heads: (
        (torch.tensordot(x, w.view(3, heads, -1, WIDTH), ([2], [3])) + b.view(3, heads, -1))
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    ),
    "matmul over heads": lambda x, w, b, linear, heads: each(
        lambda p, c: x[:, None] @ p.view(heads, -1, WIDTH).mT + c.view(heads, 1, -1), w, b
    ),
    "baddbmm over heads": lambda x, w, b, linear, heads: each(
        lambda p, c: torch.baddbmm(
            c.view(1, heads, 1, -1).expand(len(x), -1, -1, -1).flatten(0, 1),
            x[:, None].expand(-1, heads, -1, -1).flatten(0, 1),
            p.view(1, heads, -1, WIDTH).mT.expand(len(x), -1, -1, -1).flatten(0, 1),
        ).unflatten(0, (-1, heads)),
        *(w, b),
    ),
    "multiply and sum": lambda x, w, b, linear, heads: each(
        lambda p, c: (x[:, None, :, None] * p.view(heads, 1, -1, WIDTH)).sum(-1) + c.view(heads, 1, -1),
        *(w, b),
    ),
    "head by head": lambda x, w, b, linear, heads: each(
        lambda p, c: torch.stack(
            [linear(x, one, d) for one, d in zip(p.chunk(heads), c.chunk(heads), strict=True)], 1
        ),
        *(w, b),
    ),
    "conv1d": lambda x, w, b, linear, heads: [
        part.unflatten(1, (heads, -1)).mT for part in F.conv1d(x.mT, w[..., None], b).chunk(3, 1)
    ],
}


def by_hand(scores, dim):
    weights = (scores - scores.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


def by_hand_in_place(scores, dim):
    weights = scores - scores.max(dim, keepdim=True).values
    weights.exp_()
    weights /= weights.sum(dim, keepdim=True)
    return weights


def by_hand_reciprocal(scores, dim):
    weights = torch.exp(scores)
    return weights * weights.sum(dim, True).reciprocal()


def by_hand_by_two(scores, dim):
    weights = torch.exp2(scores * math.log2(math.e))
    return torch.div(weights, weights.sum(dim, keepdim=True))


def nothing(scores):
    return torch.zeros(scores.shape[-2:], dtype=torch.bool)


def into(scores, dim):
    made = torch.empty_like(scores)
    torch.softmax(scores, dim, out=made)
    return made


SOFTMAX = {
    "F.softmax": lambda s, dim: F.softmax(s, dim),
    "method": lambda s, dim: s.softmax(dim=dim),
    "module": lambda s, dim: nn.Softmax(dim)(s),
    "torch.softmax, with a type": lambda s, dim: torch.softmax(s, dim, dtype=REAL),
    "torch.special.softmax": lambda s, dim: torch.special.softmax(s, dim),
    "softmin": lambda s, dim: F.softmin(-s, dim),
    "exp over its sum": lambda s, dim: s.exp() / s.exp().sum(dim, keepdim=True),
    "exp over its sum, less the greatest": by_hand,
    "in place": by_hand_in_place,
    "by a reciprocal": by_hand_reciprocal,
    "powers of two": by_hand_by_two,
    "log_softmax, exp": lambda s, dim: s.log_softmax(dim).exp(),
    "less logsumexp": lambda s, dim: (s - s.logsumexp(dim, keepdim=True)).exp(),
    "less the log of a sum": lambda s, dim: torch.exp(s - s.exp().sum(dim, keepdim=True).log()),
    "masked_fill": lambda s, dim: s.masked_fill(nothing(s), -math.inf).softmax(dim),
    "a mask added": lambda s, dim: (s + torch.zeros(s.shape[-2:], dtype=s.dtype)).softmax(dim),
    "where": lambda s, dim: torch.where(nothing(s), torch.tensor(-math.inf, dtype=s.dtype), s).softmax(dim),
    "of the other side": lambda s, dim: s.mT.softmax(-3 - dim).mT,
    "flat": lambda s, dim: (
        s.movedim(dim, -1).flatten(0, -2).softmax(-1).view(s.movedim(dim, -1).shape).movedim(-1, dim)
    ),
    "in two parts": lambda s, dim: torch.cat([s[:1].softmax(dim), s[1:].softmax(dim)]),
    "and dropout": lambda s, dim: F.dropout(s.softmax(dim), 0.3, training=False),
    "written again": lambda s, dim: torch.empty_like(s).copy_(s.softmax(dim)),
    "out=": into,
    "a square over its sum": lambda s, dim: (
        by_hand(s / 2, dim).square() / by_hand(s / 2, dim).square().sum(dim, True)
    ),
    "sigmoid of a log": lambda s, dim: torch.sigmoid(s - torch.log(s.exp().sum(dim, True) - s.exp())),
    "a vector that sums": lambda s, dim: (
        s.exp() / (s.exp().transpose(dim, -1) @ s.new_ones(s.shape[dim], 1)).transpose(dim, -1)
    ),
}


def scaled(q, k):
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5


def queries_by_two(q, k, v, soft):
    return torch.cat([soft(scaled(part, k), -1) @ v for part in q.split(9, -2)], -2)


def over_images(q, k, v, soft):
    return torch.stack([soft(scaled(a, b), -1) @ c for a, b, c in zip(q, k, v, strict=True)])


def over_all(q, k, v, soft):
    """Attend with torch.mm for each image and each head."""

    def one(a, b, c):
        return torch.mm(soft(torch.mm(a, b.t()) / a.shape[-1] ** 0.5, -1), c)

    flat = zip(*flat_heads(q, k, v), strict=True)
    return torch.stack([one(*matrices) for matrices in flat]).view_as(v)


def over_queries(q, k, v, soft):
    rows = [soft(scaled(q[:, :, i : i + 1], k), -1) @ v for i in range(q.shape[2])]
    return torch.cat(rows, 2)


def over_heads(q, k, v, soft):
    return torch.stack([soft(scaled(q[:, h], k[:, h]), -1) @ v[:, h] for h in range(q.shape[1])], 1)


def into_a_buffer(q, k, v, soft):
    mixed = torch.empty_like(v)
    for h in range(q.shape[1]):
        mixed[:, h] = soft(scaled(q[:, h], k[:, h]), -1) @ v[:, h]
    return mixed


def flat_heads(q, k, v):
    return [part.reshape(-1, *part.shape[2:]) for part in (q, k, v)]


def bmm(q, k, v, soft):
    a, b, c = flat_heads(q, k, v)
    return torch.bmm(soft(torch.bmm(a, b.transpose(1, 2)) * a.shape[-1] ** -0.5, -1), c).view_as(v)


def baddbmm(q, k, v, soft):
    a, b, c = flat_heads(q, k, v)
    empty = torch.zeros(1, 1, 1, dtype=q.dtype)
    weights = soft(torch.baddbmm(empty, a, b.mT, beta=0, alpha=a.shape[-1] ** -0.5), -1)
    return torch.baddbmm(torch.zeros_like(c), weights, c).view_as(v)


def keys_first(q, k, v, soft):
    weights = soft(scaled(k, q), -2)
    return weights.mT @ v


def keys_and_values_first(q, k, v, soft):
    weights = soft(torch.einsum("bhjd,bhid->bhji", k, q) / q.shape[-1] ** 0.5, -2)
    return torch.einsum("bhjd,bhji->bhid", v, weights)


def tokens_first(q, k, v, soft):
    """Attend with the heads after the tokens, as in (B, N, heads, D) layouts."""
    a, b, c = (part.transpose(1, 2) for part in (q, k, v))
    weights = soft(torch.einsum("bihd,bjhd->bhij", a, b).mul(q.shape[-1] ** -0.5), -1)
    return torch.einsum("bhij,bjhd->bihd", weights, c).transpose(1, 2)


def scores_out(q, k, v, soft):
    scores = q.new_empty(*q.shape[:3], k.shape[2])
    torch.matmul(q, k.mT, out=scores)
    scores /= q.shape[-1] ** 0.5
    return torch.matmul(soft(scores, -1), v, out=torch.empty_like(v))


def normalized_afterwards(q, k, v, soft):
    weights = scaled(q, k).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def normalized_afterwards_by_one(q, k, v, soft):
    scores = scaled(q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    values = torch.einsum("bhij,bhjd->bihd", weights, v)
    return (values * (1 / weights.sum(-1)).transpose(1, 2)[..., None]).transpose(1, 2)


def split_values(q, k, v, soft):
    weights = soft(scaled(q, k), -1)
    return torch.cat([weights @ v[..., :3], weights @ v[..., 3:]], -1)


def split_keys(q, k, v, soft):
    weights = soft(scaled(q, k), -1)
    return weights[..., :9] @ v[:, :, :9] + weights[..., 9:] @ v[:, :, 9:]


SDPA = F.scaled_dot_product_attention
ATTEND = {
    "matmul": lambda q, k, v, soft: soft(scaled(q, k), -1) @ v,
    "sdpa": lambda q, k, v, soft: SDPA(q, k, v),
    "sdpa, scaled before": lambda q, k, v, soft: SDPA(q * q.shape[-1] ** -0.5, k, v, scale=1.0),
    "sdpa, a mask of zeros": lambda q, k, v, soft: SDPA(
        q, k, v, attn_mask=torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    ),
    "sdpa, a mask of truths": lambda q, k, v, soft: SDPA(
        q, k, v, attn_mask=torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    ),
    "sdpa, heads in the batch": lambda q, k, v, soft: SDPA(*flat_heads(q, k, v)).view_as(v),
    "sdpa, head by head": lambda q, k, v, soft: torch.cat(
        [SDPA(*(part[:, h : h + 1] for part in (q, k, v))) for h in range(q.shape[1])], 1
    ),
    "sdpa, heads before images": lambda q, k, v, soft: SDPA(
        *(part.transpose(0, 1) for part in (q, k, v))
    ).transpose(0, 1),
    "queries scaled": lambda q, k, v, soft: torch.matmul(
        soft(torch.matmul(q * q.shape[-1] ** -0.5, k.mT), -1), v
    ),
    "both scaled": lambda q, k, v, soft: (
        soft((q * q.shape[-1] ** -0.25) @ (k.mT * q.shape[-1] ** -0.25), -1) @ v
    ),
    "divided": lambda q, k, v, soft: soft(q.matmul(k.mT).div_(math.sqrt(q.shape[-1])), -1).matmul(v),
    "einsum": lambda q, k, v, soft: torch.einsum(
        "bhij,bhjd->bhid",
        *(soft(torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5, -1), v),
    ),
    "einsum, tokens first": tokens_first,
    "einsum, keys first": keys_and_values_first,
    "matmul, keys first": keys_first,
    "bmm": bmm,
    "baddbmm": baddbmm,
    "head by head": over_heads,
    "head by head into a buffer": into_a_buffer,
    "image by image": over_images,
    "mm for each": over_all,
    "query by query": over_queries,
    "queries in two parts": queries_by_two,
    "multiply and sum": lambda q, k, v, soft: (soft(scaled(q, k), -1).unsqueeze(-1) * v.unsqueeze(-3)).sum(
        -2
    ),
    "multiply and sum, values first": lambda q, k, v, soft: torch.sum(
        v[:, :, None] * soft(scaled(q, k), -1)[..., None], dim=3
    ),
    "scores by multiply and sum": lambda q, k, v, soft: (
        soft((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) / q.shape[-1] ** 0.5, -1) @ v
    ),
    "values on the left": lambda q, k, v, soft: (v.mT @ soft(scaled(q, k), -1).mT).mT,
    "values on the left, mT again": lambda q, k, v, soft: torch.matmul(
        v.transpose(-2, -1), soft(scaled(q, k), -1).transpose(-2, -1)
    ).transpose(-2, -1),
    "a broadcast dimension": lambda q, k, v, soft: (
        soft(scaled(q[:, :, None], k[:, :, None]), -1) @ v[:, :, None]
    ).squeeze(2),
    "out=": scores_out,
    "divided by the sum afterwards": normalized_afterwards,
    "times one over the sum afterwards": normalized_afterwards_by_one,
}


def merged(out):
    return out.transpose(1, 2).reshape(len(out), out.shape[2], -1)


def pieces(out, w):
    """Return the contribution of each head to the output."""
    size = out.shape[-1]
    return [out[:, h] @ w[:, h * size : h * size + size].T for h in range(out.shape[1])]


def with_bias(first, *rest, b):
    return [first + b, *rest]


def merged_into(out):
    made = out.new_zeros(len(out), out.shape[2], WIDTH)
    size = out.shape[-1]
    for h in range(out.shape[1]):
        made[..., h * size : (h + 1) * size] = out[:, h]
    return made


def accumulated(out, w, b):
    total = b.expand(len(out), out.shape[2], -1)
    size = out.shape[-1]
    for h in range(out.shape[1]):
        weight = w[:, h * size : (h + 1) * size].T
        total = torch.baddbmm(total, out[:, h], weight.expand(len(out), -1, -1))
    return total


# Each returns the terms of the branch; `linear` is the spelling of the output projection.
MERGE = {
    "transpose, reshape": lambda out, w, b, linear: [linear(merged(out), w, b)],
    "permute, flatten": lambda out, w, b, linear: [linear(out.permute(0, 2, 1, 3).flatten(2), w, b)],
    "contiguous, view": lambda out, w, b, linear: [
        linear(out.transpose(1, 2).contiguous().view(len(out), -1, WIDTH), w, b)
    ],
    "cat": lambda out, w, b, linear: [linear(torch.cat(out.unbind(1), -1), w, b)],
    "stack": lambda out, w, b, linear: [linear(torch.stack(list(out.unbind(1)), 2).flatten(2), w, b)],
    "einsum, reshape": lambda out, w, b, linear: [
        linear(torch.einsum("bhnd->bnhd", out).reshape(len(out), -1, WIDTH), w, b)
    ],
    "slices assigned": lambda out, w, b, linear: [linear(merged_into(out), w, b)],
    "einsum with the weights": lambda out, w, b, linear: [
        torch.einsum("bhnd,chd->bnc", out, w.view(WIDTH, out.shape[1], -1)) + b
    ],
    "tensordot with the weights": lambda out, w, b, linear: [
        torch.tensordot(out, w.view(WIDTH, out.shape[1], -1), ([1, 3], [1, 2])) + b
    ],
    "matmul over heads, summed": lambda out, w, b, linear: [
        (out @ w.unflatten(1, (out.shape[1], -1)).permute(1, 2, 0)).sum(1) + b
    ],
    "heads added up": lambda out, w, b, linear: [sum(pieces(out, w)) + b],
    "heads stacked and summed": lambda out, w, b, linear: [torch.stack(pieces(out, w)).sum(0) + b],
    "heads accumulated by baddbmm": lambda out, w, b, linear: [accumulated(out, w, b)],
    "heads are terms of the residual": lambda out, w, b, linear: with_bias(*pieces(out, w), b=b),
}


def torchs_own(x, w, b, out, c, heads, visible=False):
    y = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        *(WIDTH, heads, w, b, None, None, False, 0.0, out, c),
        training=False,
        need_weights=visible,
    )[0]
    return [y.transpose(0, 1)]


torchs_own_visible = functools.partial(torchs_own, visible=True)


def each_head(x, w, b, heads, fused):
    """Yield the output of each head, (B, N, D), computed from x with its own weights."""
    size = WIDTH // heads
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        q, k, v = each(lambda p, c, own=own: F.linear(x, p[own], c[own]), w, b)
        yield SDPA(q, k, v) if fused else (q @ k.mT / size**0.5).softmax(-1) @ v


def heads_apart(x, w, b, out, c, heads, fused=False):
    return [
        F.linear(one, weight)
        for one, weight in zip(each_head(x, w, b, heads, fused), out.chunk(heads, 1), strict=True)
    ]


# From x to the terms of the branch; None if it is computed in the steps above.
ATTENTION = {
    "in steps": None,
    "multi_head_attention_forward": torchs_own,
    "multi_head_attention_forward, with weights": torchs_own_visible,
    "head by head, concatenated": lambda x, w, b, out, c, heads: [
        F.linear(torch.cat(list(each_head(x, w, b, heads, False)), -1), out, c)
    ],
    "head by head, added": lambda *args: [sum(heads_apart(*args)) + args[4]],
    "head by head, terms of the residual": lambda *args: with_bias(*heads_apart(*args), b=args[4]),
    "fused, head by head, concatenated": lambda x, w, b, out, c, heads: [
        F.linear(torch.cat(list(each_head(x, w, b, heads, True)), -1), out, c)
    ],
    "fused, head by head, added": lambda *args: [sum(heads_apart(*args, fused=True)) + args[4]],
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

IN_PIECES = ("the class token apart", "the tokens as one batch")  # joined after the projection


@dataclass(frozen=True)
class Pending:
    """A term that is not projected yet; the sum projects it."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def add_up(x, terms):
    return functools.reduce(torch.add, terms, x)


def all_but(x, terms):
    """Return the sum of the terms without the stream."""
    return add_up(terms[0], terms[1:])


def added(term_by_term):
    """Return a spelling of x + f that adds one term after the other."""
    return lambda x, terms: functools.reduce(term_by_term, terms, x)


def at_once(x_and_rest):
    """Return a spelling of x + f in which f is the sum of all branches."""
    return lambda x, terms: x_and_rest(x, all_but(x, terms))


def of_stack(total):
    return lambda x, terms: total(torch.stack([x, *terms]))


def in_slices(x, f):
    y = x.clone()
    y[:, :1] += f[:, :1]
    y[:, 1:] += f[:, 1:]
    return y


def in_a_view(x, f):
    """Add f through views that were made before they are written into."""
    y = x.clone()
    patches, first = y[:, 1:], y.select(1, 0)
    patches.add_(f[:, 1:])
    first += f[:, 0]
    return y


def over(x, f):
    y = torch.empty_like(x)
    y.copy_(x)
    y.add_(f)
    return y


def copied_over(x, f):
    """Copy the sum back into the stream."""
    total = x + f
    x.copy_(total)
    return x


def put_at(x, f):
    rows, columns = torch.arange(len(x))[:, None], torch.arange(x.shape[1])[None]
    return x.clone().index_put_((rows, columns), f, accumulate=True)


def assigned_at(x, f):
    y = torch.empty_like(x)
    for place in range(x.shape[1]):
        y[:, place] = x[:, place] + f[:, place]
    return y


def into_product(multiply):
    """Return a spelling of the sum that projects pending terms."""

    def spelling(x, terms):
        for term in terms:
            x = multiply(x, term) if isinstance(term, Pending) else x + term
        return x

    return spelling


def product_in_place(x, term):
    x = (x + term.bias).contiguous()
    x.flatten(0, 1).addmm_(term.hidden.flatten(0, 1), term.weight.T)
    return x


PENDING = {
    "addmm": into_product(
        lambda x, term: (
            torch.addmm(x.flatten(0, 1), term.hidden.flatten(0, 1), term.weight.T).view_as(x) + term.bias
        )
    ),
    "addmm, bias first": into_product(
        lambda x, term: torch.addmm(
            (x + term.bias).flatten(0, 1), term.hidden.flatten(0, 1), term.weight.T
        ).view_as(x)
    ),
    "addmm_": into_product(product_in_place),
    "baddbmm of the stream": into_product(
        lambda x, term: torch.baddbmm(x, term.hidden, term.weight.T.expand(len(x), -1, -1)) + term.bias
    ),
}
SUM = {
    "x + f": added(lambda x, f: x + f),
    "f + x": added(lambda x, f: f + x),
    "torch.add": added(torch.add),
    "the branches first": at_once(lambda x, f: x + f),
    "the branches first, x last": at_once(lambda x, f: f + x),
    "x last": lambda x, terms: add_up(terms[0], [*terms[1:], x]),
    "x in between": lambda x, terms: add_up(terms[-1], [x, *terms[:-1]]),
    "backward": lambda x, terms: add_up(terms[-1], [*reversed(terms[:-1]), x]),
    "x to the first, then the rest": lambda x, terms: add_up(x + terms[-1], terms[:-1]),
    "sum()": lambda x, terms: sum([x, *terms]),
    "+=": lambda x, terms: functools.reduce(lambda y, f: y.__iadd__(f), terms, x.clone()),
    "into the stream itself": lambda x, terms: functools.reduce(lambda y, f: y.add_(f), terms, x),
    "into the branch": lambda x, terms: functools.reduce(
        lambda y, f: y.add_(f), [x, *terms[1:]], terms[0].clone()
    ),
    "alpha": added(lambda x, f: torch.add(x, f / 2, alpha=2)),
    "less its opposite": added(lambda x, f: x - (-f)),
    "sub, alpha": added(lambda x, f: torch.sub(x, f, alpha=-1)),
    "rsub": added(lambda x, f: torch.rsub(-x, f)),
    "the opposite of a difference": added(lambda x, f: -(-x - f)),
    "stack, sum": of_stack(lambda stack: stack.sum(0)),
    "stack, mean": of_stack(lambda stack: stack.mean(0) * len(stack)),
    "stack, einsum": of_stack(lambda stack: torch.einsum("sbnc->bnc", stack)),
    "stack, unbind, add": of_stack(lambda stack: functools.reduce(torch.add, stack.unbind())),
    "stack at the end, sum": lambda x, terms: torch.stack([x, *terms], -1).sum(-1),
    "stack, the branches first": lambda x, terms: torch.sum(torch.stack([*terms, x], 1), 1),
    "cat, view, sum": lambda x, terms: torch.cat([x, *terms]).view(-1, *x.shape).sum(0),
    "lerp": added(lambda x, f: torch.lerp(x, f, 0.5) * 2),
    "lerp, unevenly": added(lambda x, f: torch.lerp(x / 0.75, f * 4, 0.25)),
    "lerp by a tensor": added(lambda x, f: 2 * x.lerp(f, torch.full((WIDTH,), 0.5, dtype=x.dtype))),
    "addcmul": added(lambda x, f: torch.addcmul(x, f, torch.ones(WIDTH, dtype=x.dtype))),
    "addcdiv": added(lambda x, f: torch.addcdiv(x, f, torch.full((WIDTH,), 2.0, dtype=x.dtype), value=2)),
    "a factor of ones": added(lambda x, f: x + torch.ones(WIDTH, dtype=x.dtype) * f),
    "in slices": at_once(in_slices),
    "in views": at_once(in_a_view),
    "copy_, add_": at_once(over),
    "copied into the stream": at_once(copied_over),
    "token by token": at_once(
        lambda x, f: torch.stack([x[:, i] + f[:, i] for i in range(x.shape[1])], 1)
    ),
    "token by token, assigned": at_once(assigned_at),
    "tokens in two parts": at_once(
        lambda x, f: torch.cat([x[:, :1] + f[:, :1], x[:, 1:] + f[:, 1:]], 1)
    ),
    "channels in two parts": at_once(
        lambda x, f: torch.cat([x[..., :7] + f[..., :7], x[..., 7:] + f[..., 7:]], -1)
    ),
    "image by image": at_once(
        lambda x, f: torch.stack([a + b for a, b in zip(x, f, strict=True)])
    ),
    "flat": at_once(lambda x, f: (x.flatten() + f.flatten()).view_as(x)),
    "channels in front": at_once(lambda x, f: (x.mT + f.mT).mT),
    "index_add": at_once(lambda x, f: x.index_add(1, torch.arange(x.shape[1]), f)),
    "index_put_": at_once(put_at),
    "scatter_add": at_once(
        lambda x, f: x.scatter_add(1, torch.arange(x.shape[1])[None, :, None].expand_as(x), f)
    ),
    "out=": added(lambda x, f: torch.add(x, f, out=torch.empty_like(x))),
    "out= the branch": at_once(lambda x, f: torch.add(x, f, out=f.contiguous())),
    "out= the stream": at_once(lambda x, f: torch.add(x, f, out=x)),
    **PENDING,
}  # fmt: skip


def chosen(y):
    return F.one_hot(torch.tensor(0), y.shape[1]).to(y)


def only_first(y):
    return (torch.arange(y.shape[1]) == 0)[:, None].expand_as(y)


def shares(y):
    """Return the weights of a mean over the patches."""
    return torch.where(torch.arange(y.shape[1]) == 0, 0, 1 / (y.shape[1] - 1)).to(y)


READS = {
    "token": {
        "index": lambda y: y[:, 0],
        "select": lambda y: y.select(1, 0),
        "a slice, squeezed": lambda y: y[:, :1].squeeze(1),
        "a slice, its mean": lambda y: y[:, 0:1].mean(1),
        "narrow": lambda y: y.narrow(1, 0, 1).flatten(1),
        "unbind": lambda y: y.unbind(1)[0],
        "split": lambda y: y.split([1, y.shape[1] - 1], 1)[0][:, 0],
        "index_select": lambda y: y.index_select(1, torch.tensor([0]))[:, 0],
        "gather": lambda y: y.gather(1, torch.zeros(len(y), 1, WIDTH, dtype=torch.long))[:, 0],
        "take_along_dim": lambda y: torch.take_along_dim(y, torch.zeros(1, 1, 1, dtype=torch.long), 1)[:, 0],
        "two indices": lambda y: y[torch.arange(len(y)), torch.zeros(len(y), dtype=torch.long)],
        "a mask as an index": lambda y: y[:, torch.arange(y.shape[1]) == 0].flatten(1),
        "masked_select": lambda y: y.masked_select(only_first(y)).view(len(y), -1),
        "flip": lambda y: y.flip(1)[:, -1],
        "transpose": lambda y: y.permute(1, 0, 2)[0],
        "flat": lambda y: y.flatten(1)[:, :WIDTH],
        "as_strided": lambda y: y.contiguous().as_strided((len(y), WIDTH), (WIDTH * y.shape[1], 1)),
        "one-hot, einsum": lambda y: torch.einsum("n,bnc->bc", chosen(y), y),
        "one-hot, matmul": lambda y: (chosen(y)[None] @ y)[:, 0],
        "one-hot, bmm": lambda y: torch.bmm(chosen(y).expand(len(y), 1, -1), y).squeeze(1),
        "one-hot, matmul from the right": lambda y: y.mT @ chosen(y),
        "one-hot, tensordot": lambda y: torch.tensordot(chosen(y), y, dims=([0], [1])),
        "one-hot, multiply and sum": lambda y: (y * chosen(y)[:, None]).sum(1),
        "a mask, multiply and sum": lambda y: (only_first(y) * y).sum(dim=1),
        "where, sum": lambda y: torch.where(only_first(y), y, 0).sum(1),
        "masked_fill, sum": lambda y: y.masked_fill(~only_first(y), 0).sum(1),
        "zeros assigned, sum": lambda y: y.clone().index_fill_(1, torch.arange(1, y.shape[1]), 0).sum(1),
        "a masked mean": lambda y: (y * only_first(y)).sum(1) / only_first(y).to(y).sum(1),
        "the greatest of one": lambda y: y.masked_fill(~only_first(y), -math.inf).amax(1),
        "sort": lambda y: y[:, (torch.arange(y.shape[1]) != 0).sort(stable=True).indices[0]],
        "cumsum": lambda y: y.cumsum(1)[:, 0],
    },
    "patches": {
        "mean": lambda y: y[:, 1:].mean(1),
        "sum, over their number": lambda y: y[:, 1:].sum(dim=1) / (y.shape[1] - 1),
        "adaptive_avg_pool1d": lambda y: F.adaptive_avg_pool1d(y[:, 1:].mT, 1).flatten(1),
        "avg_pool1d": lambda y: F.avg_pool1d(y[:, 1:].mT, PATCHES).squeeze(-1),
        "a picture, mean": lambda y: y[:, 1:].unflatten(1, (SIDE, SIDE)).mean((1, 2)),
        "a picture, pooled twice": lambda y: F.avg_pool2d(
            F.avg_pool2d(y[:, 1:].mT.unflatten(2, (SIDE, SIDE)), 2), SIDE // 2
        ).flatten(1),
        "weights, matmul": lambda y: shares(y) @ y,
        "weights, einsum": lambda y: torch.einsum("bnc,n->bc", y, shares(y)),
        "weights, bmm": lambda y: torch.bmm(shares(y).expand(len(y), 1, -1), y)[:, 0],
        "weights, multiply and sum": lambda y: (y * shares(y)[:, None]).sum(1),
        "weights, matmul from the right": lambda y: torch.matmul(y.mT, shares(y)[:, None]).squeeze(-1),
        "ones, matmul": lambda y: torch.ones(1, PATCHES, dtype=y.dtype).matmul(y[:, 1:])[:, 0] / PATCHES,
        "a masked mean": lambda y: (y * ~only_first(y)).sum(1) / (~only_first(y)).sum(1),
        "token by token": lambda y: sum(y.unbind(1)[1:]) / PATCHES,
        "mean of the mean": lambda y: y[:, 1:].unflatten(1, (2, -1)).mean(2).mean(1),
        "index_add": lambda y: torch.zeros(len(y), 1, WIDTH, dtype=y.dtype).index_add(
            1, torch.zeros(PATCHES, dtype=torch.long), y[:, 1:]
        )[:, 0] / PATCHES,
        "scatter_reduce": lambda y: torch.zeros(len(y), 1, WIDTH, dtype=y.dtype).scatter_reduce(
            1, torch.zeros(1, 1, 1, dtype=torch.long).expand(len(y), PATCHES, WIDTH), y[:, 1:], "mean",
            include_self=False,
        )[:, 0],
        "image by image": lambda y: torch.stack([one[1:].mean(0) for one in y]),
    },
}  # fmt: skip
ORDER = {"norm, then read": None, "read, then norm": None}


# ---- more distant spellings: the right map or an error, never another map --------------------------------


def keys_by_blocks(q, k, v, soft):
    """Attend like FlashAttention: update the running maximum and the running sum with each block of keys."""
    total, size, top = 0, 0, torch.full((*q.shape[:3], 1), -math.inf, dtype=q.dtype)
    for keys, values in zip(k.split(6, 2), v.split(6, 2), strict=True):
        scores = scaled(q, keys)
        new = torch.maximum(top, scores.amax(-1, True))
        weights, less = (scores - new).exp(), (top - new).exp()
        total, size, top = total * less + weights @ values, size * less + weights.sum(-1, True), new
    return total / size


FAR = {
    "attend": {
        "block by block of keys": keys_by_blocks,
        "one softmax, keys in two parts": split_keys,
        "one softmax, channels in two parts": split_values,
    },
    "sum": {
        "stack, a vector of ones": of_stack(
            lambda s: torch.einsum("s,sbnc->bnc", torch.ones(len(s), dtype=s.dtype), s)
        ),
        "cumsum": of_stack(lambda s: s.cumsum(0)[-1]),
        "exp and back": added(lambda x, f: ((x + f).exp()).log()),
    },
}  # fmt: skip


def far(function):
    """Return the more distant spellings."""
    return FAR


def tables(function):
    """Return the spellings of each kind of site for one function."""
    return {
        "embed": EMBED,
        "tokens": TOKENS,
        "norm": NORM,
        "linear": LINEAR,
        "project": PROJECT,
        "softmax": SOFTMAX,
        "attend": ATTEND,
        "merge": MERGE,
        "attention": ATTENTION,
        "activation": ACTIVATIONS[function.activation],
        "mlp": MLP,
        "sum": SUM,
        "read": READS[function.read],
        "order": ORDER if function.read == "token" else {"norm, then read": None},
    }


def sites(function):
    """Return the (kind, place) of each site."""
    found = [("embed", "start"), ("tokens", "start")]
    for layer, form in enumerate(function.forms):
        twins = form in ("twins", "all")
        for attention in ("a", "b") if twins else ("a",):
            place = f"{layer}{attention}"
            kinds = ("norm", "project", "softmax", "attend", "merge", "attention")
            found += [(kind, place) for kind in kinds]
            found += [("linear", f"{place} in"), ("linear", f"{place} out")]
        found += [(kind, f"{layer}m") for kind in ("norm", "activation", "mlp")]
        found += [("linear", f"{layer}m in"), ("linear", f"{layer}m out"), ("sum", f"{layer}a")]
        if form in ("serial", "twins"):
            found.append(("sum", f"{layer}m"))
    return [*found, ("order", "end"), ("norm", "end"), ("read", "end"), ("linear", "end")]


# ---- the network ----------------------------------------------------------------------------------------


@functools.cache
def weights(function):
    """Return the parameters of a function, large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape, size=0.1, around=0.0):
        return around + size * torch.randn(*shape, generator=generator, dtype=REAL)

    made = {
        "embed": draw(WIDTH, 3, PATCH, PATCH, size=0.3),
        "embed_bias": draw(WIDTH),
        "first": draw(1, 1, WIDTH, size=0.5),
        "place": draw(1, COUNT, WIDTH, size=0.5),
        "norm_end": draw(WIDTH, around=1.0),
        "norm_end_bias": draw(WIDTH),
        "head": draw(CLASSES, WIDTH, size=0.5),
        "head_bias": draw(CLASSES),
    }
    double = 2 if function.activation == "swiglu" else 1
    for layer in range(len(function.forms)):
        for one in "ab":
            made |= {
                f"qkv_{layer}{one}": draw(3 * WIDTH, WIDTH, size=0.35),
                f"qkv_{layer}{one}_bias": draw(3 * WIDTH),
                f"out_{layer}{one}": draw(WIDTH, WIDTH, size=0.3),
                f"out_{layer}{one}_bias": draw(WIDTH),
            }
        made |= {
            f"up_{layer}": draw(double * HIDDEN, WIDTH, size=0.4),
            f"up_{layer}_bias": draw(double * HIDDEN),
            f"down_{layer}": draw(WIDTH, HIDDEN, size=0.3),
            f"down_{layer}_bias": draw(WIDTH),
        }
        for one in "abm":
            made |= {
                f"norm_{layer}{one}": draw(WIDTH, around=1.0),
                f"norm_{layer}{one}_bias": draw(WIDTH),
            }
    return made


class Written(nn.Module):
    """The network of a function, spelled as `how` says, {(kind, place): spelling}; other sites are plain."""

    def __init__(self, function, how=None):
        super().__init__()
        self.function, self.how = function, dict(how or {})
        self.tables = {
            kind: {**table, **far(function).get(kind, {})} for kind, table in tables(function).items()
        }
        # a network that writes into out= cannot be trained
        trained = not any("out=" in name for name in self.how.values())
        for name, value in weights(function).items():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=trained))

    def name(self, kind, place):
        return self.how.get((kind, place)) or next(iter(self.tables[kind]))

    def spelled(self, kind, place):
        return self.tables[kind][self.name(kind, place)]

    def pair(self, name):
        return getattr(self, name), getattr(self, f"{name}_bias")

    def normed(self, x, place):
        return self.spelled("norm", place)(x, *self.pair(f"norm_{place}"))

    def projection(self, total, place):
        """Return the last linear layer of a branch, which may be left to the sum."""
        whole = place[-1] != "m" or self.name("mlp", place) not in IN_PIECES
        if whole and self.name("sum", total) in PENDING:
            return Pending
        return self.spelled("linear", f"{place} out")

    def attended(self, x, place, total):
        """Return the terms of an attention."""
        x, heads = self.normed(x, place), self.function.heads
        qkv, out = self.pair(f"qkv_{place}"), self.pair(f"out_{place}")
        whole = self.spelled("attention", place)
        if whole is not None:
            return whole(x, *qkv, *out, heads)
        linear = self.spelled("linear", f"{place} in")
        q, k, v = self.spelled("project", place)(x, *qkv, linear, heads)
        mixed = self.spelled("attend", place)(q, k, v, self.spelled("softmax", place))
        return self.spelled("merge", place)(mixed, *out, self.projection(total, place))

    def fed(self, x, layer, total):
        """Return the terms of an MLP."""
        place = f"{layer}m"
        return self.spelled("mlp", place)(
            self.normed(x, place),
            *(*self.pair(f"up_{layer}"), *self.pair(f"down_{layer}")),
            self.spelled("linear", f"{place} in"),
            self.spelled("activation", place),
            self.projection(total, place),
            self.function.activation == "swiglu",
        )

    def total(self, x, terms, place):
        return self.spelled("sum", place)(x, terms)

    def block(self, x, layer, form):
        first, second = f"{layer}a", f"{layer}m"
        terms = self.attended(x, first, first)
        if form in ("twins", "all"):
            terms = terms + self.attended(x, f"{layer}b", first)
        if form in ("beside", "all"):
            return self.total(x, terms + self.fed(x, layer, first), first)
        x = self.total(x, terms, first)
        return self.total(x, self.fed(x, layer, second), second)

    def forward(self, images):
        x = self.spelled("embed", "start")(images, *self.pair("embed"))
        x = self.spelled("tokens", "start")(x, self.first, self.place)
        for layer, form in enumerate(self.function.forms):
            x = self.block(x, layer, form)
        read = self.spelled("read", "end")
        if self.name("order", "end") == "norm, then read":
            x = read(self.normed(x, "end"))[:, None]
        else:
            x = self.normed(read(x)[:, None], "end")
        return self.spelled("linear", "end")(x, *self.pair("head"))[:, 0]


# ---- expected results, from full matrices ----------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """The results that every spelling of a function must give.

    Attributes:
        output: the logits.
        maps: keyed by "method" or "method, gradient", (B, SIDE, SIDE); those of evidence are signed.
        seen: attention and its gradient by layer for each network, where a layer is a residual.
        parts: the shares of the score from the image and from constants, in the linearized network.
    """

    output: torch.Tensor
    maps: dict
    seen: dict
    parts: tuple


def some_images():
    return torch.randn(BATCH, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(3), dtype=REAL)


def held_norm(x, w, b, held):
    x = x - x.mean(-1, keepdim=True)
    size = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x / (size.detach() if held else size) * w + b


def held_gate(h, kind, held):
    gates = {
        "erf": lambda h: (1 + torch.erf(h / 2**0.5)) / 2,
        "tanh": lambda h: (1 + torch.tanh(cubed(h))) / 2,
        "quick": lambda h: torch.sigmoid(1.702 * h),
        "silu": torch.sigmoid,
        "relu": lambda h: (h > 0).to(h),
    }
    if kind != "swiglu":
        gate = gates[kind](h)
        return h * (gate.detach() if held else gate)
    gate, up = h.chunk(2, -1)
    gate = gate * (gate.sigmoid().detach() if held else gate.sigmoid())
    return (gate * up.detach() + gate.detach() * up) / 2 if held else gate * up


class Slow:
    """The function again, with every (token, channel) matrix in full, and with A kept."""

    def __init__(self, function, held):
        self.function, self.held = function, held
        self.weights = {name: value.clone().requires_grad_() for name, value in weights(function).items()}
        self.layers, self.streams = [], []
        self.replaced = None  # A of the last layer, if given

    def pair(self, name):
        return self.weights[name], self.weights[f"{name}_bias"]

    def norm(self, x, place):
        return held_norm(x, *self.pair(f"norm_{place}"), self.held)

    def attention(self, x, place):
        w, b = self.pair(f"qkv_{place}")
        q, k, v = ((self.norm(x, place) @ w.T + b).view(len(x), COUNT, 3, self.function.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
        if self.held:
            attention = attention.detach().requires_grad_()
        if self.replaced is not None and len(self.layers) == len(self.function.forms):
            attention = self.replaced[len(self.layers[-1])]
        self.layers[-1].append(attention)
        w, b = self.pair(f"out_{place}")
        return torch.einsum("bhij,bjhd->bihd", attention, v).reshape(len(x), COUNT, WIDTH) @ w.T + b

    def mlp(self, x, layer):
        (w, b), (v, c) = self.pair(f"up_{layer}"), self.pair(f"down_{layer}")
        hidden = self.norm(x, f"{layer}m") @ w.T + b
        return held_gate(hidden, self.function.activation, self.held) @ v.T + c

    def __call__(self, images):
        w, b = self.pair("embed")
        x = torch.einsum("bcipjq,dcpq->bijd", blocks(images), w).reshape(len(images), PATCHES, WIDTH) + b
        x = torch.cat([self.weights["first"].expand(len(x), -1, -1), x], 1) + self.weights["place"]
        for layer, form in enumerate(self.function.forms):
            self.layers.append([])
            change = self.attention(x, f"{layer}a")
            if form in ("twins", "all"):
                change = change + self.attention(x, f"{layer}b")
            if form in ("beside", "all"):
                x = x + (change + self.mlp(x, layer))
                self.streams.append(x)
                continue
            x = x + change
            self.streams.append(x)
            x = x + self.mlp(x, layer)
            self.streams.append(x)
        x = self.norm(x, "end")
        w, b = self.pair("head")
        return (x[:, 0] if self.function.read == "token" else x[:, 1:].mean(1)) @ w.T + b


def score(logits):
    return sum(logits[image, index] for image, index in enumerate(TARGET))


def share(map_):
    return map_ / map_.abs().sum(1, keepdim=True)


@functools.cache
@torch.enable_grad()
def expected(function):
    """Compute the maps of a function the slow way."""
    seen, maps = {}, {}
    read = function.read
    for network in ("linearised", "plain"):
        slow, images = Slow(function, network == "linearised"), some_images().requires_grad_()
        logits = slow(images)
        flat = [attention for layer in slow.layers for attention in layer]
        wanted = [*flat, *slow.streams, images, *slow.weights.values()]
        found = torch.autograd.grad(score(logits), wanted, allow_unused=True)
        of = {id(value): gradient for value, gradient in zip(wanted, found, strict=True)}
        attentions = [torch.cat(layer, 1).detach() for layer in slow.layers]
        gradients = [torch.cat([of[id(a)] for a in layer], 1) for layer in slow.layers]
        seen[network] = oracle.Observation(attentions, gradients, None, logits.detach())
        maps[f"grad_rollout, {network}"] = oracle.maps_of(seen[network], "grad_rollout", 1, read)
        maps[f"gae, {network}"] = oracle.gae_maps(seen[network], 1, read)
        if network == "plain":
            maps["rollout"] = oracle.maps_of(seen[network], "rollout", 1, read)
            continue
        rows = slice(0, 1) if read == "token" else slice(1, None)
        pairs = zip(attentions, gradients, strict=True)
        taken = sum((a * g)[:, :, rows].sum((1, 2)) for a, g in pairs)[:, 1:]
        held = sum((x * of[id(x)]).sum(-1).detach() for x in slow.streams)[:, 1:]
        maps["evidence"] = share(taken) + share(held)
        added = [v for name, v in slow.weights.items() if "bias" in name or name in ("first", "place")]
        parts = [(v * of[id(v)]).sum().item() for v in (images, *added) if of[id(v)] is not None]
    maps = {name: found.view(BATCH, SIDE, SIDE) for name, found in maps.items()}
    return Expected(logits.detach(), maps, seen, (parts[0], sum(parts[1:])))


# ---- results of vitx -------------------------------------------------------------------------------------

PASSES = (
    {"rollout": {}, "grad_rollout": {}, "gae": {}, "evidence": {}},
    {"grad_rollout": {"gradient": "plain"}, "gae": {"gradient": "plain"}},
)


def named(method, options):
    """Return the name of a map in `Expected`."""
    return f"{method}, {options.get('gradient', 'linearised')}" if method in PASSES[1] else method


def map_of(method, explanation):
    return explanation.signed if method == "evidence" else explanation.maps


def distance(found, wanted):
    """Return the error relative to the largest value of each map; infinite if the grids differ."""
    if found.shape != wanted.shape:
        return math.inf
    off = (found.double() - wanted).abs().flatten(1).amax(1)
    return (off / wanted.abs().flatten(1).amax(1)).max().item()


def explained(model, passes=PASSES):
    """Return the maps of all methods, named as in `Expected`."""
    maps = {}
    for methods in passes:
        found = explain_methods(model, some_images(), methods, target=TARGET)
        for method, explanation in found.items():
            maps[named(method, methods[method])] = map_of(method, explanation)
    return maps


def same_function(model):
    """Return how far the output is from that of the function."""
    with torch.no_grad():
        return (model(some_images()) - expected(model.function).output).abs().max().item()


IN_PARTS = {"image by image", "mm for each", "query by query", "queries in two parts"}


def mixture(rng):
    """Draw a function and a spelling of it at random."""
    function = Function(
        tuple(
            rng.choice(["serial", "serial", "beside", "twins", "all"]) for _ in range(rng.choice([2, 2, 3]))
        ),
        rng.choice(list(ACTIVATIONS)),
        rng.choice(["token", "token", "patches"]),
        rng.choice([2, 3]),
    )
    known, often = tables(function), rng.choice([0.15, 0.4, 0.8])
    how = {}
    for kind, place in sites(function):
        # an attention in one piece has no steps to spell
        rare = 0.2 if kind == "attention" else 1
        if rng.random() < often * rare:
            how[kind, place] = rng.choice(list(known[kind]))
    for layer, form in enumerate(function.forms):
        first, second = f"{layer}a", f"{layer}b"
        parts = IN_PARTS & {how.get(("attend", first)), how.get(("attend", second))}
        if (
            form in ("twins", "all") and parts
        ):  # all heads of a residual in the same parts, else it is refused
            how["attend", first] = how["attend", second] = sorted(parts)[0]
            how.pop(("attention", first), None)
            how.pop(("attention", second), None)
    return function, how


def alone(table=tables):
    """Yield (function, kind, spelling) for each spelling of each kind, which is used at all its sites."""
    for kind in tables(Function()):
        if kind == "activation":
            functions = [Function(activation=name) for name in ACTIVATIONS]
        elif kind == "read":
            functions = [Function(read=name) for name in READS]
        elif kind == "sum":
            functions = [Function(), Function(("all", "beside"))]
        elif kind in ("merge", "attention"):
            functions = [Function(), Function(("twins", "all"))]
        else:
            functions = [Function()]
        for function in functions:
            for spelling in table(function).get(kind, ()):
                yield function, kind, spelling


def everywhere(function, kind, spelling):
    """Return {(kind, place): spelling} with the same spelling for all sites of a kind."""
    return {(other, place): spelling for other, place in sites(function) if other == kind}


def mixtures(count, seed):
    rng = random.Random(seed)
    return [mixture(rng) for _ in range(count)]


def verdicts(function, how):
    """Return for each map ("right" or another verdict, details)."""
    model, wanted = Written(function, how).eval(), expected(function).maps
    found = {}
    for methods in PASSES:
        for method, options in methods.items():
            name = named(method, options)
            try:
                maps = explained(model, [{method: options}])
            except VitxError as error:
                found[name] = ("refused", str(error))
            except Exception as error:
                found[name] = ("traceback", f"{type(error).__name__}: {error}")
            else:
                off = distance(maps[name], wanted[name])
                found[name] = ("right", "") if off < 1e-6 else ("wrong", f"off by {off:.2g}")
    return found


def to_blame(function, how, name, verdict):
    """Return only the spellings that matter for a verdict, without those that can be left out."""
    method, _, gradient = name.partition(", ")
    options = {"gradient": gradient} if gradient == "plain" else {}
    left = dict(how)

    def bad(some):
        try:
            maps = explained(Written(function, some).eval(), [{method: options}])
        except VitxError:
            return "refused"
        except Exception:
            return "traceback"
        return "right" if distance(maps[name], expected(function).maps[name]) < 1e-6 else "wrong"

    for site in list(how):
        fewer = {other: spelling for other, spelling in left.items() if other != site}
        if bad(fewer) == verdict:
            left = fewer
    return " + ".join(sorted({f"{kind}: {spelling}" for (kind, _), spelling in left.items()})) or str(
        function
    )


def main(words):
    """Print a tally."""
    torch.set_num_threads(1)
    if words[:1] == ["singles"]:
        cases = [(function, everywhere(*one)) for one in alone() for function in one[:1]]
    else:
        cases = mixtures(int(words[0]), int(words[1]) if words[1:] else 0)
    tally, culprits = collections.defaultdict(collections.Counter), collections.Counter()
    sentences = {}
    for function, how in cases:
        off = same_function(Written(function, how).eval())
        assert off < 1e-9, (off, function, how)
        for name, (verdict, said) in verdicts(function, how).items():
            tally[name][verdict] += 1
            if verdict != "right":
                culprit = verdict, to_blame(function, how, name, verdict)
                culprits[culprit] += 1
                sentences.setdefault(culprit, f"{name}: {said}")
    for name, counts in tally.items():
        print(
            f"{name:26}",
            *(f"{verdict} {counts[verdict]:4}" for verdict in ("right", "wrong", "refused", "traceback")),
        )
    for (verdict, spelling), count in sorted(culprits.items(), key=lambda pair: (pair[0][0], -pair[1])):
        print(f"{verdict:9} {count:3}  {spelling}\n               {sentences[verdict, spelling][:150]}")


if __name__ == "__main__":
    main(sys.argv[1:])
