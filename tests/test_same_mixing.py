"""Mixing tokens between two attentions has the same maps, however it is written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.same_function import COUNT, check_tokens, clone_then, fixed, mixing, spellings


def test_shares_of_a_mixing_are_in_proportion():
    """The matrix of a linear map of tokens has the right entries, one by one."""
    weights = fixed(5)
    for row, found in zip(weights, mixing(plain_mixing), strict=True):
        total = sum(abs(w) for w in row.tolist())
        assert found.tolist() == pytest.approx([abs(w) / total for w in row.tolist()])
    plus_mean = mixing(lambda t: t[:, :1] + t[:, 1:].mean(1, keepdim=True))
    assert plus_mean[0].tolist() == pytest.approx([0.5, *[0.5 / 16] * 16])
    assert mixing(dropped).sum(1).tolist() == [0.0 if i in (3, 8, 13) else 1.0 for i in range(COUNT)]


class Mixing(nn.Module):
    """A mixing of tokens by a fixed matrix, which is a buffer or a plain tensor."""

    def __init__(self, apply, plain=False):
        super().__init__()
        self.register_buffer("matrix", None if plain else fixed(5))
        if plain:
            del self.matrix
            self.matrix = fixed(5)
        self.apply_it = apply

    def forward(self, t):
        return self.apply_it(self.matrix, t)


def plain_mixing(t):
    return torch.stack([sum(w * t[:, i] for i, w in enumerate(row)) for row in fixed(5)], 1)


def clusters():
    """Return the cluster of each token; the first is for the class token alone, and the tenth is empty."""
    return torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 7, 8, 8, 8, 8])


def sizes_of_clusters(t):
    return clusters().bincount(minlength=10).clamp(min=1).to(t)


def sums_in_clusters(t):
    return torch.stack([t[:, clusters() == number].sum(1) for number in range(10)], 1)


def means_in_clusters(t):
    return sums_in_clusters(t) / sizes_of_clusters(t)[:, None]


def no_tokens(t):
    return t.new_zeros(len(t), 10, t.shape[-1])


def index_of(t):
    return clusters()[None, :, None].expand(len(t), -1, t.shape[-1])


def some_dropped():
    return torch.arange(COUNT) % 5 == 3


def zeros_by_index(t):
    t[:, some_dropped()] = 0


def dropped(t):
    return torch.where(some_dropped()[:, None], torch.zeros_like(t), t)


def restored(t):
    """Put the kept tokens back among mask tokens, as masked autoencoders do."""
    return t[:, torch.tensor([0, *range(COUNT - 1, 0, -1)])]


def by_masked_scatter(t):
    mask = torch.arange(COUNT) > 0
    made = t[:, :1].expand_as(t).clone()
    return made.masked_scatter(mask[:, None].expand_as(t), t[:, 1:].flip(1))


def merged_tokens(t):
    """Merge the last four tokens into places 1, 1, 2 and 3, as token merging does."""
    parts = [t[:, 0], (t[:, 1] + t[:, -4] + t[:, -3]) / 3, (t[:, 2] + t[:, -2]) / 2, (t[:, 3] + t[:, -1]) / 2]
    return torch.cat([torch.stack(parts, 1), t[:, 4:-4]], 1)


def merged_by_scatter_reduce(t):
    where = torch.tensor([1, 1, 2, 3])[None, :, None].expand(len(t), -1, t.shape[-1])
    return t[:, :-4].scatter_reduce(1, where, t[:, -4:], "mean", include_self=True)


# A plain form, and other spellings of it.
LIKE = {
    plain_mixing: {
        "a buffer": Mixing(lambda m, t: m @ t),
        "a buffer, einsum": Mixing(lambda m, t: torch.einsum("mn,bnc->bmc", m, t)),
        "a buffer, bmm": Mixing(lambda m, t: torch.bmm(m.expand(len(t), -1, -1), t)),
        "a buffer, on the right": Mixing(lambda m, t: (t.mT @ m.T).mT),
        "a buffer, F.linear": Mixing(lambda m, t: F.linear(t.mT, m).mT),
        "a buffer, a product and a sum": Mixing(lambda m, t: (m[..., None] * t[:, None]).sum(2)),
        "a buffer, tensordot": Mixing(lambda m, t: torch.tensordot(t, m, ([1], [1])).transpose(1, 2)),
        "a plain tensor": Mixing(lambda m, t: m @ t, plain=True),
        "a plain tensor, a product and a sum": Mixing(lambda m, t: (m[..., None] * t[:, None]).sum(2), True),
        "a plain tensor, abs first": Mixing(lambda m, t: (m.abs() * m.sign()) @ t, plain=True),
    },
    sums_in_clusters: {
        "index_add": lambda t: no_tokens(t).index_add(1, clusters(), t),
        "index_add_": lambda t: no_tokens(t).index_add_(1, clusters(), t),
        "scatter_add": lambda t: no_tokens(t).scatter_add(1, index_of(t), t),
        "scatter_reduce, sum": lambda t: no_tokens(t).scatter_reduce(1, index_of(t), t, "sum"),
    },
    means_in_clusters: {
        "scatter_reduce, mean": lambda t: no_tokens(t).scatter_reduce(
            1, index_of(t), t, "mean", include_self=False
        ),
        "one-hot clusters": lambda t: F.one_hot(clusters(), 10).to(t).T @ t / sizes_of_clusters(t)[:, None],
    },
    merged_tokens: {"scatter_reduce, merging": merged_by_scatter_reduce},
    restored: {"masked_scatter": by_masked_scatter},
    dropped: {
        "masked_fill": lambda t: t.masked_fill(some_dropped()[:, None], 0.0),
        "masked_fill_": clone_then(lambda t: t.masked_fill_(some_dropped()[:, None], 0.0)),
        "index_fill_": clone_then(lambda t: t.index_fill_(1, some_dropped().nonzero()[:, 0], 0)),
        "zeros by index": clone_then(zeros_by_index),
    },
}
BETWEEN = spellings(LIKE)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_to_tokens(name):
    check_tokens(*BETWEEN[name])
