"""Ways to write how images become tokens, and how tokens are read. The plain way comes first."""

import math

import torch
from torch.nn import functional as F

from tests.rewriting.function import COUNT, IMAGE, PATCH, PATCHES, REAL, SIDE, WIDTH


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
    "conv2d, padded and cropped": lambda x, w, b: (
        F.conv2d(F.pad(x, (PATCH,) * 4), w, b, PATCH)[:, :, 1:-1, 1:-1].flatten(2).mT
    ),
    "conv2d, flipped": lambda x, w, b: F.conv2d(x.flip(-1), w.flip(-1), b, PATCH).flip(-1).flatten(2).mT,
    "conv2d, dilated": lambda x, w, b: (
        F.conv2d(blocks(x).permute(0, 1, 3, 2, 5, 4).reshape(x.shape), w, b, dilation=SIDE).flatten(2).mT
    ),
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
    "nothing of the patches": lambda x, first, place: torch.cat([first + 0 * x[:, :1], x], 1) + place,
    "a matrix that shifts": lambda x, first, place: (
        torch.matmul(shift(), x) + (place + F.pad(first, (0, 0, 0, PATCHES)))
    ),
    "an einsum that shifts": lambda x, first, place: (
        torch.einsum("tn,bnc->btc", shift(), x) + is_first().to(x)[:, None] * first + place
    ),
}


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
        "one-hot, conv1d": lambda y: F.conv1d(y, chosen(y)[None, :, None])[:, 0],
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
        "the sum of two sums": lambda y: (y[:, 1:8].sum(1) + y[:, 8:].sum(1)) / PATCHES,
        "two means": lambda y: (y[:, 1:8].mean(1) * 7 + y[:, 8:].mean(1) * (PATCHES - 7)) / PATCHES,
        "var_mean": lambda y: torch.var_mean(y[:, 1:], 1)[1],
        "softmax of zeros": lambda y: (y.new_zeros(PATCHES, 1).softmax(0) * y[:, 1:]).sum(1),
        "a fixed convolution": lambda y: F.conv1d(y, shares(y)[None, :, None])[:, 0],
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
