"""Writing to tokens between two attentions has the same maps as reading them in another order."""

import pytest
import torch

from tests.same_function import (
    BEGINNING,
    COUNT,
    METHODS,
    Net,
    check_tokens,
    clone_then,
    found_maps,
    frozen,
    off,
    spellings,
)


def first_takes_mean(t):
    return torch.cat([t[:, :1] + t[:, 1:].mean(1, keepdim=True), t[:, 1:]], 1)


def first_is_mean(t):
    return torch.cat([t[:, 1:].mean(1, keepdim=True), t[:, 1:]], 1)


def order_of(**moved):
    """Return a reordering of the tokens; t3=5 puts token 5 in place 3."""
    order = torch.arange(COUNT)
    for name, source in moved.items():
        order[int(name[1:])] = source
    return lambda t: t[:, order]


def add_to_first(t):
    t[:, 0].add_(t[:, 1:].mean(1))


def add_to_view(t):
    first, patches = t[:, 0], t[:, 1:]
    first += patches.mean(1)


def read_of_old_view(t):
    """Copy from a view that is older than a write, and that shows what was written."""
    third = t[:, 3]
    t[:, 3] = t[:, 5]
    t[:, 7] = third


def read_of_old_copy(t):
    third = t[:, 3].clone()
    t[:, 3] = t[:, 5]
    t[:, 7] = third


def view_of_a_view(t):
    turned = t.transpose(0, 1)
    row = turned[3]
    row.copy_(turned[5])


def view_in_channels(t):
    """Write to the same token twice, through different views."""
    token = t[:, 4]
    token[:, ::2] = t[:, 9, ::2]
    t[:, 4, 1::2] = t[:, 9, 1::2]


def written_in_flat(t):
    t.view(-1, t.shape[-1])[6::COUNT] = t[:, 2]


def mean_by_copy(t):
    made = torch.empty_like(t)
    made.copy_(t)
    made[:, :1] = t[:, 1:].mean(1, keepdim=True)
    return made


def turned_by_copies(t):
    """Transpose by copies, as functionalized programs do."""
    aten = torch.ops.aten
    turned = aten.transpose_copy.int(aten.permute_copy(t, [0, 2, 1]), 1, 2)
    return torch.stack([aten.t_copy(aten.t_copy(one)) for one in turned])


def shifted_by_scratch(t):
    scratch = torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)
    shifted = t + scratch
    scratch.zero_()
    return shifted


def gathered_into(t):
    made = torch.empty_like(t)
    torch.index_select(t, 1, torch.arange(COUNT).roll(2), out=made)
    return made


def concatenated_into(t):
    made = torch.empty_like(t)
    torch.cat([t[:, -2:], t[:, :-2]], 1, out=made)
    return made


def swapped_by_index_put(t):
    rows = torch.arange(len(t))[:, None]
    return t.index_put_((rows, torch.tensor([[3, 5]])), t[:, [5, 3]])


def accumulated(t):
    made = torch.zeros_like(t)
    for place in range(t.shape[1]):
        made[:, place] += t[:, place]
    made[:, 0] += t[:, 1:].mean(1)
    return made


def zeroed_then_written(t):
    old = t.clone()
    t.zero_()
    t.add_(old)
    t[:, 0] += old[:, 1:].mean(1)


def mean_into_itself(t):
    t[:, :1].copy_(t[:, 1:].mean(1, keepdim=True))


def rolled_within(t):
    t[:, 1:].copy_(t[:, 1:].roll(3, 1))


def rolled(t):
    return t.roll(2, 1)


def same(t):
    return t


def turned(t):
    return torch.cat([t[:, :1], t[:, 1:].roll(3, 1)], 1)


def test_a_constant_that_is_written_over_later():
    scratch, kept = (found_maps(frozen(Net(between=change))) for change in (shifted_by_scratch, shifted))
    assert max(off(scratch, kept).values()) < 1e-6


def shifted(t):
    return t + torch.linspace(-1, 1, t.shape[-1], dtype=t.dtype)


LIKE = {
    first_takes_mean: {
        "into a slice": clone_then(add_to_first),
        "into a view": clone_then(add_to_view),
        "accumulated": accumulated,
        "zeroed, then written": clone_then(zeroed_then_written),
    },
    first_is_mean: {"copy_, then a slice": mean_by_copy, "a slice of itself": clone_then(mean_into_itself)},
    order_of(t3=5, t7=5): {"a view that is older than the write": clone_then(read_of_old_view)},
    order_of(t3=5, t7=3): {"a copy that is older than the write": clone_then(read_of_old_copy)},
    order_of(t3=5): {"a view of a view": clone_then(view_of_a_view)},
    order_of(t4=9): {"views of some channels": clone_then(view_in_channels)},
    order_of(t6=2): {"a flat view": clone_then(written_in_flat)},
    order_of(t3=5, t5=3): {
        "tokens by index": clone_then(lambda t: t.__setitem__((slice(None), [3, 5]), t[:, [5, 3]])),
        "index_put_": clone_then(swapped_by_index_put),
    },
    rolled: {"out=": gathered_into, "out= of cat": concatenated_into},
    turned: {"rolled within itself": clone_then(rolled_within)},
    same: {
        "detach": lambda t: t.detach(),
        "views that are copies": turned_by_copies,
        "type": lambda t: t.type(torch.float64),
        "type, by name": lambda t: t.type("torch.DoubleTensor"),
        "type_as": lambda t: t.type_as(torch.zeros((), dtype=torch.float64)),
        "data": lambda t: t.data,
    },
}
BETWEEN = spellings(LIKE)


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_to_tokens(name):
    change, plain = BETWEEN[name]
    # evidence cannot know whether a token plus the mean of others is a residual
    check_tokens(change, plain, BEGINNING if plain is first_takes_mean else METHODS)
