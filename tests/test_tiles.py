"""How attention is divided, and products of its parts."""

import pytest
import torch

from vitx.functional import tiles
from vitx.functional.tiles import ALL, Memory, Tile, products, split, without_copies

B, H, N = 5, 3, 37


@pytest.mark.parametrize("tile", [2**30, 700])
def test_rows_set_apart_share_no_tile_with_others(monkeypatch, tile):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    parts = list(split((B, H, N, N), torch.device("cpu"), slice(2, 9)))
    seen = torch.zeros(B, H, N)
    for part in parts:
        seen[part] += 1
        assert part[2].stop <= 2 or part[2].start >= 9 or 2 <= part[2].start < part[2].stop <= 9
    assert (seen == 1).all()


def test_the_division_of_an_image_does_not_depend_on_those_beside_it():
    of_one, of_many = (
        {part[1:] for part in map(bounds, split((images, 12, 577, 577), torch.device("cpu")))}
        for images in (1, 40)
    )
    assert of_one == of_many
    assert len(of_one) == 12


def bounds(part):
    return tuple((one.start, one.stop) for one in part)


def test_the_tiles_of_a_gpu_are_large():
    assert len(list(split((B, H, N, N), torch.device("cuda")))) == 1
    assert len(list(split((8, 12, 4097, 4097), torch.device("cuda")))) == 3 * 12


def test_a_tile_is_computed_when_it_is_read():
    calls = []
    tile = Tile(ALL, ALL, ALL, H, lambda *part: calls.append(part) or torch.ones(1), None)
    assert not calls
    assert tile.weights is tile.weights
    assert len(calls) == 1
    assert tile.gradient is None


def test_products():
    left, right = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 6)
    assert torch.allclose(products(left, right), left @ right, atol=1e-6)
    total = torch.randn(2, 3, 5, 6)
    wanted = total + 0.5 * left @ right
    assert products(left, right, out=total, scale=0.5, add=True) is total
    assert torch.allclose(total, wanted, atol=1e-6)
    assert products(left, right, out=total) is total
    assert torch.allclose(total, left @ right, atol=1e-6)


@pytest.mark.parametrize("add", [True, False])
def test_products_that_are_written_between_others(add):
    left, right = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 4, 6)
    whole = torch.randn(2, 3, 5, 6)
    wanted = whole.clone()
    wanted[:, 1:2] = left @ right + (whole[:, 1:2] if add else 0)
    products(left, right, out=whole[:, 1:2], add=add)
    assert torch.allclose(whole, wanted, atol=1e-6)


def test_memory_is_used_again():
    memory = Memory()
    first = memory.take("this", (4, 5), torch.empty(1))
    assert first.shape == (4, 5)
    assert memory.take("this", (3, 2), torch.empty(1)).data_ptr() == first.data_ptr()
    assert memory.take("that", (3, 2), torch.empty(1)).data_ptr() != first.data_ptr()
    assert memory.take("this", (5, 5), torch.empty(1)).shape == (5, 5)
    assert memory.take("this", (2,), torch.empty(1).double()).dtype == torch.float64


def test_memory_of_inference_mode_is_not_used_outside():
    memory = Memory()
    with torch.inference_mode():
        memory.take("this", (4,), torch.empty(1))
    memory.take("this", (4,), torch.empty(1)).zero_()


def test_what_is_kept_lies_together_and_stays():
    memory = Memory()
    wanted = [torch.randn(3, 5, 7).mT, torch.arange(3), torch.randn(2, 9).to(torch.bfloat16)]
    kept = [memory.keep(tensor) for tensor in wanted]
    assert all(map(torch.equal, kept, wanted))
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in kept)
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1


def test_what_does_not_fit_into_a_block_is_kept_in_another(monkeypatch):
    monkeypatch.setattr(tiles, "_BLOCK", 64)
    memory = Memory()
    wanted = [torch.randn(10), torch.randn(10), torch.randn(100), torch.randn(1)]
    assert all(map(torch.equal, [memory.keep(tensor) for tensor in wanted], wanted))


def test_what_is_kept_in_inference_mode():
    with torch.inference_mode():
        memory = Memory()
        assert memory.keep(torch.ones(3, 2).mT).is_contiguous()
    assert torch.equal(memory.keep(torch.ones(4)), torch.ones(4))


@pytest.mark.parametrize("images", [1, 2, 3, 7])
@pytest.mark.parametrize("room", [1, 2 * N * N, 2**30])
def test_each_matrix_is_multiplied_once(monkeypatch, images, room):
    monkeypatch.setattr(tiles, "_room", lambda device: room)
    seen = torch.zeros(images, H)
    for part in without_copies(images, H, N * N, torch.device("cpu")):
        seen[part] += 1
    assert (seen == 1).all()
