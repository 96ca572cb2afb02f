"""Ways to write a softmax, and attention on queries, keys and values. The plain way comes first."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tests.rewriting.function import REAL


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
    "normalize": lambda s, dim: F.normalize(s.exp(), p=1, dim=dim),
    "a distribution": lambda s, dim: torch.distributions.Categorical(logits=s.movedim(dim, -1)).probs.movedim(
        -1, dim
    ),
    "over its mean": lambda s, dim: s.exp() / s.exp().mean(dim, True) / s.shape[dim],
    "odds over their sum": lambda s, dim: by_hand((s.sigmoid() / (-s).sigmoid()).log(), dim),
    "sorted and back": lambda s, dim: (
        s.gather(dim, s.argsort(dim)).softmax(dim).gather(dim, s.argsort(dim).argsort(dim))
    ),
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


def values_and_ones(q, k, v, soft):
    """Attend to a channel of ones, too, which adds up the exponentials."""
    sums = scaled(q, k).exp() @ F.pad(v, (0, 1), value=1.0)
    return sums[..., :-1] / sums[..., -1:]


def padded_keys(q, k, v, soft):
    """Attend to three more keys, which a mask hides."""
    k, v = F.pad(k, (0, 0, 0, 3)), F.pad(v, (0, 0, 0, 3))
    return SDPA(q, k, v, attn_mask=(torch.arange(k.shape[2]) < k.shape[2] - 3).expand(q.shape[2], -1))


def reversed_keys(q, k, v, soft):
    return soft(scaled(q, k.flip(2)), -1) @ v.flip(2)


def beside_each_other(q, k, v, soft):
    """Attend to the tokens of all images at once, with a mask that keeps them apart."""
    same = torch.block_diag(*[torch.ones(q.shape[2], q.shape[2])] * len(q)).bool()
    joined = (part.transpose(0, 1).flatten(1, 2) for part in (q, k, v))
    return SDPA(*joined, attn_mask=same).unflatten(1, (len(q), -1)).transpose(0, 1)


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
    "sdpa, padded channels": lambda q, k, v, soft: SDPA(
        *(F.pad(part, (0, 3)) for part in (q, k, v)), scale=q.shape[-1] ** -0.5
    )[..., : v.shape[-1]],
    "scores by distances": lambda q, k, v, soft: (
        soft((k.square().sum(-1)[..., None, :] - torch.cdist(q, k) ** 2) / 2 / q.shape[-1] ** 0.5, -1) @ v
    ),
    "vmap": lambda q, k, v, soft: torch.vmap(torch.vmap(lambda a, b, c: scaled(a, b).softmax(-1) @ c))(
        q, k, v
    ),
    "values and ones": values_and_ones,
    "divided by the sum afterwards": normalized_afterwards,
    "times one over the sum afterwards": normalized_afterwards_by_one,
}


def keys_by_blocks(q, k, v, soft):
    """Attend like FlashAttention: update the running maximum and the running sum with each block of keys."""
    total, size, top = 0, 0, torch.full((*q.shape[:3], 1), -math.inf, dtype=q.dtype)
    for keys, values in zip(k.split(6, 2), v.split(6, 2), strict=True):
        scores = scaled(q, keys)
        new = torch.maximum(top, scores.amax(-1, True))
        weights, less = (scores - new).exp(), (top - new).exp()
        total, size, top = total * less + weights @ values, size * less + weights.sum(-1, True), new
    return total / size
