"""Overviews: the mean map peaks where all maps do, and the crops surround their brightest patches."""

import pytest
import torch

from vitx import Explanation, VitxError
from vitx.pictures.overview import _CROP, Overview, crop, overview_of
from vitx.pictures.render import GAP, LINE, TILE_WIDTH

HEAD = LINE + 2


def pictures(count, size=32):
    """Return black images with a red quarter, and maps whose brightest patch, (1, 6), lies in it."""
    maps = torch.full((count, 8, 8), 0.1)
    maps[:, 1, 6] = 1
    pixels = torch.zeros(count, size, size, 3, dtype=torch.uint8)
    pixels[:, : size // 2, size // 2 :, 0] = 255
    return pixels, maps


def test_the_mean_lies_where_the_maps_do_and_the_crops_show_it():
    drawn = overview_of(*pictures(3))
    tile = drawn[HEAD + LINE : HEAD + LINE + TILE_WIDTH, GAP : GAP + TILE_WIDTH].astype(int).sum(2)
    row, column = divmod(tile.argmax(), TILE_WIDTH)
    assert row // (TILE_WIDTH / 8) == 1
    assert column // (TILE_WIDTH / 8) == 6
    top = 2 * HEAD + LINE + TILE_WIDTH + GAP
    crops = drawn[top : top + _CROP, GAP : 3 * (_CROP + GAP)]
    assert (crops[:, :_CROP] == (255, 0, 0)).all()
    assert (crops[:, 2 * (_CROP + GAP) :][:, :_CROP] == (255, 0, 0)).all()


def test_classes_have_a_mean_each_up_to_ten_and_24_pictures_a_crop():
    pixels, maps = pictures(40)
    heights = [
        overview_of(pixels, maps, names).shape[0]
        for names in (None, ["a"] * 40, ["a", "b"] * 20, [str(n % 11) for n in range(40)])
    ]
    row = LINE + TILE_WIDTH + GAP
    assert [height - heights[0] for height in heights] == [0, 0, 0, row]
    seen = Overview()
    for number in range(100):
        seen.add(torch.full((16, 16, 3), number, dtype=torch.uint8), maps[number % 40])
    places = [int(one.mean()) for one in seen._crops]
    assert len(set(places)) == 24
    assert max(places) > 50
    assert places == sorted(places)


def test_other_sizes_join_and_constant_maps_have_no_crop():
    found = Overview()
    found.add(*(one[0] for one in pictures(1)))
    found.add(torch.zeros(48, 20, 3, dtype=torch.uint8), torch.ones(12, 5))
    assert found._all.count == 2
    assert found._seen == 1
    assert found.draw().shape[2] == 3


def test_without_crops_there_is_no_heading_of_crops():
    pixels = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    spotted = torch.zeros(1, 4, 4)
    spotted[0, 1, 2] = 1
    even, some = (overview_of(pixels, maps) for maps in (torch.ones(1, 4, 4), spotted))
    assert len(some) - len(even) > 60, "a row of crops, and the line above it"


def test_crops_at_an_edge_stay_inside():
    pixels, maps = pictures(1)
    maps[0, 7, 7] = 2
    assert crop(pixels[0], maps[0]).shape == (12, 12, 3)


def test_of_an_explanation():
    pixels, maps = pictures(2)
    images = pixels.permute(0, 3, 1, 2) / 255
    found = Explanation(maps, torch.eye(2), None, (32, 32), images)
    assert found.overview().dtype == found.overview(class_names=["cat", "dog"]).dtype == "uint8"
    assert (found.overview() != found.overview(class_names=["cat", "dog"])).any()


def test_what_is_no_picture_is_said():
    with pytest.raises(VitxError, match="not clips"):
        overview_of(torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), torch.ones(1, 2, 4, 4))
