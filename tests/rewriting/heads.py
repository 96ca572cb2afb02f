"""Ways to make queries, keys and values, and to merge heads. The plain way comes first."""

import functools

import torch
from torch.nn import functional as F

from tests.rewriting.attention import SDPA
from tests.rewriting.function import WIDTH


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


def grouped(out, w, b, linear):
    weights = torch.cat(w.chunk(out.shape[1], 1))[..., None]
    parts = F.conv1d(out.mT.flatten(1, 2), weights, groups=out.shape[1])
    return [parts.unflatten(1, (out.shape[1], -1)).sum(1).mT + b]


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
    "a grouped convolution, summed": grouped,
    "channels of heads in turn": lambda out, w, b, linear: [
        linear(out.permute(0, 2, 3, 1).flatten(2), w.unflatten(1, (out.shape[1], -1)).mT.flatten(1), b)
    ],
    "one head, and the others": lambda out, w, b, linear: [
        F.linear(merged(out[:, :1]), w[:, : out.shape[-1]], b)
        + F.linear(out[:, 1:].transpose(1, 2).flatten(2), w[:, out.shape[-1] :])
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
