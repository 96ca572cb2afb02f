"""How tensors lie in their storages, and what is kept of them."""

import gc

import pytest
import torch
from torch import nn

from vitx.tape.axes import dimension, tokens
from vitx.tape.storages import Keeper, geometry, lay, moved, overlap, storage_of

WHOLE = 60
VIEWS = {
    "all": lambda x: x,
    "a matrix": lambda x: x.view(5, 12),
    "transposed": lambda x: x.view(5, 12).T,
    "a part": lambda x: x.view(5, 12)[1:4, 2:9:3],
    "a row": lambda x: x.view(5, 12)[3],
    "a diagonal": lambda x: x[:25].view(5, 5).diagonal(),
    "expanded": lambda x: x[:5, None].expand(5, 4),
    "an overlap": lambda x: x.unfold(0, 6, 2),
    "one number": lambda x: x[17],
}


@pytest.mark.parametrize("name", VIEWS)
def test_the_geometry_is_that_of_the_view(name):
    flat = torch.arange(float(WHOLE))
    view = VIEWS[name](flat)
    assert torch.equal(torch.arange(float(WHOLE)).as_strided(*geometry(view)), view)
    assert storage_of(view) == storage_of(flat)


@pytest.mark.parametrize("name", VIEWS)
def test_laid_is_the_transpose_of_the_view(name):
    flat = torch.zeros(WHOLE, dtype=torch.float64, requires_grad=True)
    view = VIEWS[name](flat)
    part = torch.randn(view.shape, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(view, flat, part)
    torch.testing.assert_close(lay(part, geometry(view), (WHOLE,)), wanted)
    alike = part[..., :1].expand(part.shape) if part.ndim else part
    (wanted,) = torch.autograd.grad(VIEWS[name](flat), flat, alike)
    torch.testing.assert_close(lay(alike, geometry(view), (WHOLE,)), wanted)


def test_the_axes_of_a_part():
    held = (dimension(5, False)[0], dimension(12, True)[0])  # a storage of 5 tokens with 12 channels each
    flat = torch.zeros(WHOLE)
    found = moved((held,), geometry(flat.view(5, 12)[1:4, 2:9:3]))
    assert found == (*tokens((3,)), dimension(3, True))
    assert moved((held,), geometry(flat.view(5, 12).T)) == (dimension(12, True), *tokens((5,)))


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (lambda x: x[:, 0], lambda x: x[:, 1:], False),
        (lambda x: x[:, 0], lambda x: x[2], True),
        (lambda x: x[:2], lambda x: x[2:], False),
        (lambda x: x[::2], lambda x: x[1::2], False),
        (lambda x: x[::2], lambda x: x.T[3], True),
        (lambda x: x, lambda x: x[4, 11], True),
    ],
)
def test_overlap(first, second, common):
    matrix = torch.zeros(5, 12)
    geometries = geometry(first(matrix)), geometry(second(matrix))
    assert overlap(*geometries, WHOLE) == overlap(*geometries[::-1], WHOLE) == common


def test_storages_are_told_apart():
    one, other = torch.zeros(3), torch.zeros(3)
    assert storage_of(one) == storage_of(one[1:]) == storage_of(one.detach()) != storage_of(other)
    assert storage_of(nn.Parameter(one)) == storage_of(one)
    assert storage_of(one.to_sparse()) is None


def test_what_is_kept_stays_as_it_was():
    tensor, other = torch.arange(6.0).view(2, 3), torch.zeros(2)
    keeper = Keeper()
    kept = [keeper.keep(part) for part in (tensor, tensor[1], tensor.T, other)]
    keeper.preserve([tensor[0]])
    tensor.fill_(-1)
    assert kept[0].tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert kept[1].tensor.tolist() == [3, 4, 5]
    assert kept[2].tensor.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert kept[3].tensor.data_ptr() == other.data_ptr(), "nobody wrote there"


def test_nothing_is_copied_for_what_was_let_go():
    tensor = torch.zeros(3)
    keeper = Keeper()
    kept = keeper.keep(tensor)
    assert kept.tensor.data_ptr() == tensor.data_ptr()
    del kept
    gc.collect()
    keeper.preserve([tensor])
    again = keeper.keep(tensor)
    keeper.preserve([tensor])
    keeper.preserve([tensor])  # a second write needs no second copy
    copy = again.tensor
    tensor.fill_(1)
    keeper.preserve([tensor])
    assert again.tensor is copy
    assert copy.tolist() == [0, 0, 0]
