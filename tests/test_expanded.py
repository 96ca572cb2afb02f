"""Arithmetic on expanded tensors gives the same results as on plain ones, and keeps them expanded."""

import itertools

import pytest
import torch

from vitx.tape.expanded import added, core, fitted, reshaped, scaled, spread, summed

SHAPE = (2, 3, 4, 5)


def tensors():
    """Yield a tensor for each choice of expanded dimensions."""
    for count in range(len(SHAPE) + 1):
        for dims in itertools.combinations(range(len(SHAPE)), count):
            sizes = [1 if dim in dims else size for dim, size in enumerate(SHAPE)]
            yield torch.randn(sizes, dtype=torch.float64).expand(SHAPE)


def stored(tensor):
    """Return how many elements a tensor stores."""
    return core(tensor).numel()


def test_core():
    for tensor in tensors():
        assert torch.equal(core(tensor).expand(SHAPE), tensor)
        assert core(tensor).numel() == len(set(tensor.flatten().tolist()))


def test_core_of_a_part_that_does_not_begin_at_the_first_element():
    tensor = torch.arange(12.0).view(3, 4)[1:, 2:, None].expand(2, 2, 5)
    assert core(tensor).flatten().tolist() == [6, 7, 10, 11]


def test_scaled():
    factor = torch.randn(1, 3, 1, 5, dtype=torch.float64)
    for tensor in tensors():
        assert torch.equal(scaled(tensor, 0.5), tensor.contiguous() * 0.5)
        assert stored(scaled(tensor, 0.5)) == stored(tensor)
        assert torch.equal(scaled(tensor, factor), tensor.contiguous() * factor)
        assert scaled(tensor, 1) is tensor


def test_added():
    for first, second in itertools.product(tensors(), tensors()):
        found = added(first, second)
        assert torch.equal(found, first.contiguous() + second.contiguous())
        same = [dim for dim in range(4) if first.stride(dim) == 0 == second.stride(dim)]
        assert [dim for dim in range(4) if found.stride(dim) == 0] == same


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [[], [0], [-1], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_summed(dims, keepdim):
    for tensor in tensors():
        found = summed(tensor, dims, keepdim)
        wanted = tensor.contiguous().sum(dims, keepdim) if dims else tensor
        torch.testing.assert_close(found, wanted)
        assert stored(found) <= stored(tensor)


@pytest.mark.parametrize("shape", [SHAPE, (1, 3, 4, 1), (4, 5), (5,), (1, 1), (3, 1, 1), ()])
def test_fitted_is_the_transpose_of_broadcasting(shape):
    start = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    for tensor in tensors():
        (wanted,) = torch.autograd.grad(start.expand(SHAPE), start, tensor.contiguous())
        torch.testing.assert_close(fitted(tensor, shape), wanted)


@pytest.mark.parametrize(
    "shape", [(6, 4, 5), (2, 12, 5), (2, 3, 20), (2, 3, 2, 2, 5), (120,), (3, 2, 4, 5), (2, 1, 3, 4, 1, 5, 1)]
)
def test_reshaped(shape):
    for tensor in tensors():
        found = reshaped(tensor, shape)
        assert torch.equal(found, tensor.contiguous().reshape(shape))


@pytest.mark.parametrize(
    ("dims", "shape", "left"),
    [
        ([3], (6, 4, 5), 24),
        ([2, 3], (2, 3, 20), 6),
        ([0, 1], (6, 4, 5), 20),
        ([2], (2, 3, 2, 2, 5), 30),
        ([3], (2, 3, 20), 120),
        ([1, 3], (6, 4, 5), 24),
        ([0, 2], (2, 3, 20), 60),
    ],
)
def test_what_stays_apart_stays_expanded(dims, shape, left):
    sizes = [1 if dim in dims else size for dim, size in enumerate(SHAPE)]
    assert stored(reshaped(torch.randn(sizes).expand(SHAPE), shape)) == left


@pytest.mark.parametrize("size", [0, 4])
def test_what_a_sum_has_is_spread_over_what_it_summed(size):
    """Each summed element gets an equal part; an empty slice gets nothing."""
    part = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    shares = spread(part, (2, size), (1,))
    assert shares.shape == (2, size)
    assert torch.equal(shares.sum(1, keepdim=True), part if size else torch.zeros_like(part))
