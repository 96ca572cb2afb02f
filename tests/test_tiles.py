"""The division of attention into tiles, their products, and the memory that they reuse."""

import pytest
import torch

from vitx.functional import tiles
from vitx.functional.tiles import ALL, Memory, Tile, split

B, H, N = 5, 3, 37


@pytest.mark.parametrize("tile", [2**30, 700])
def test_every_entry_of_the_rows_is_in_one_tile(monkeypatch, tile):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    parts = list(split((B, H, N, N), torch.device("cpu"), slice(2, 9)))
    seen = torch.zeros(B, H, N)
    for part in parts:
        seen[part] += 1
    assert (seen[..., 2:9] == 1).all()
    assert (seen[..., :2] == 0).all()
    assert (seen[..., 9:] == 0).all()


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


@pytest.mark.parametrize("heads", [slice(None), slice(1, 2)])
def test_products(heads):
    memory = Memory()
    left, right = torch.randn(2, 3, 5, 4)[:, heads], torch.randn(2, 3, 6, 4).mT[:, heads]
    memory.take("this", (100,), left).fill_(torch.nan)
    found = memory.products("this", left, right)
    assert torch.allclose(found, left @ right, atol=1e-6)
    assert memory.take("this", (1,), left).data_ptr() == found.data_ptr()


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
