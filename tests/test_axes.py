"""The contents of a value's dimensions, compared with marks that are moved along."""

import itertools

import pytest
import torch

from vitx.tape import axes as ax
from vitx.tape.axes import Factor

BATCH, TOKENS, CHANNELS = 2, 9, 12
INSIDE = (*ax.tokens((BATCH, TOKENS)), ax.dimension(CHANNELS, True))


def marks():
    """Return a number for each token, the same in all its channels."""
    return torch.arange(BATCH * TOKENS).view(BATCH, TOKENS, 1).expand(BATCH, TOKENS, CHANNELS)


def along(axes, dim):
    """Return True if a dimension holds channels of one token and nothing else."""
    return all(factor.channels for factor in axes[dim])


def seen(moved):
    """Return for each dimension whether all marks along it are equal."""
    return [bool((moved == moved.narrow(dim, 0, 1)).all()) for dim in range(moved.ndim)]


RESHAPES = [
    (18, 12),
    (2, 3, 3, 12),
    (2, 9, 3, 4),
    (2, 3, 3, 3, 4),
    (18, 3, 4),
    (2, 9, 1, 12),
    (1, 2, 9, 12, 1),
    (2, 9, 2, 2, 3),
]


@pytest.mark.parametrize("shape", RESHAPES)
def test_reshaped(shape):
    found = ax.reshaped(INSIDE, shape)
    assert [along(found, dim) for dim in range(len(shape))] == seen(marks().reshape(shape))
    assert [len(part) > 0 for part in found] == [size > 1 for size in shape]
    back = ax.reshaped(found, (BATCH, TOKENS, CHANNELS))
    assert [[f.channels for f in part] for part in back[:2]] in ([[False], [False]], [[False], [False] * 2])
    assert along(back, 2)


@pytest.mark.parametrize("shape", [(2, 108), (2, 36, 3), (216,), (6, 3, 12)])
def test_tokens_and_channels_in_one_dimension_are_told_apart(shape):
    found = ax.reshaped(INSIDE, shape)
    whole = [factor for part in found for factor in part]
    assert [f.channels for f in whole] == sorted(f.channels for f in whole), "outer ones first: tokens"
    sizes = dict.fromkeys((False, True), 1)
    for factor in whole:
        sizes[factor.channels] *= factor.size
    assert sizes == {False: BATCH * TOKENS, True: CHANNELS}


@pytest.mark.parametrize("shape", [(4, 54), (2, 2, 54), (8, 27)])
def test_a_factor_that_is_cut_unevenly_is_not_guessed(shape):
    """For example, 4 cannot be cut from 2 x 9."""
    assert ax.reshaped(INSIDE, shape) is None


def test_merged_with_images_and_back():
    """Heads move before the tokens, into the batch, and back: they count as channels all the time."""
    headed = ax.reshaped(INSIDE, (BATCH, TOKENS, 3, 4))
    first = tuple(headed[dim] for dim in (0, 2, 1, 3))
    folded = ax.reshaped(first, (BATCH * 3, TOKENS, 4))
    assert folded[0] == (Factor(BATCH, False), Factor(3, True))
    assert ax.reshaped(folded, (BATCH, 3, TOKENS, 4)) == first


def test_sizes_of_1_hold_nothing():
    assert ax.tokens((1, 5)) == ((), (Factor(5, False),))
    assert ax.dimension(1, True) == ()


def test_resized():
    """Half of the tokens, two thirds of the channels; a dimension of the same size keeps its factors."""
    found = ax.resized(INSIDE, (BATCH, 4, 8))
    assert found == (INSIDE[0], (Factor(4, False),), (Factor(8, True),))
    assert ax.resized(INSIDE, (BATCH, TOKENS, CHANNELS)) == INSIDE


def test_copies_are_channels():
    found = ax.broadcast(ax.tokens((1, TOKENS, 1)), (5, BATCH, TOKENS, CHANNELS))
    assert [along(found, dim) for dim in range(4)] == [True, True, False, True]


def test_channels_of_a_product_are_those_of_both():
    first, second = INSIDE, ax.tokens((BATCH, TOKENS, CHANNELS))
    assert ax.merged(first, first) == first
    assert ax.merged(first, second) == ax.merged(second, first) == second


MOVES = {
    "transposed": lambda x: x.transpose(1, 2),
    "rolled": lambda x: x.roll(2, 1),
    "heads first": lambda x: x.unflatten(2, (3, 4)).permute(0, 2, 1, 3),
    "windows": lambda x: x.unflatten(1, (3, 3)).transpose(0, 1).flatten(0, 1),
    "tokens picked": lambda x: x[:, [0, 4, 4]],
    "channels picked": lambda x: x[:, :, ::5],
    "flattened": lambda x: x.flatten(1),
}


@pytest.mark.parametrize("name", MOVES)
def test_by_place(name):
    moved = MOVES[name](marks())
    found = ax.by_place(INSIDE, MOVES[name])
    same = [size == 1 or one for size, one in zip(moved.shape, seen(moved), strict=True)]
    assert [along(found, dim) for dim in range(moved.ndim)] == same
    for size, part in itertools.zip_longest(moved.shape, found):
        assert [f.size for f in part] == ([size] if size > 1 else [])
