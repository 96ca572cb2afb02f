"""Heat maps, overlays and grids."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests import models
from vitx import VitxError, explain
from vitx.pictures.captions import Caption
from vitx.pictures.render import (
    GAP,
    LINE,
    TILE_WIDTH,
    beside,
    grid,
    heatmaps,
    overlays,
    palette,
    write,
)
from vitx.pictures.views import Layer


class TestHeatmaps:
    def test_each_image_fills_the_range(self):
        maps = torch.rand(3, 4, 5) * torch.tensor([1e-6, 1, 1e6])[:, None, None]
        heat = heatmaps(maps, (32, 40))
        assert tuple(heat.shape) == (3, 32, 40)
        assert heat.amin((1, 2)).tolist() == [0, 0, 0]
        assert torch.allclose(heat.amax((1, 2)), torch.ones(3))

    def test_an_image_does_not_depend_on_the_others(self):
        maps = torch.rand(2, 4, 4)
        assert torch.equal(heatmaps(maps, (16, 16))[1:], heatmaps(maps[1:], (16, 16)))

    @pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 1e-8, 1e8])
    def test_a_constant_map_is_zero(self, value):
        assert torch.equal(heatmaps(torch.full((2, 7, 7), value), (50, 31)), torch.zeros(2, 50, 31))

    def test_rounding_errors_are_no_picture(self):
        almost = torch.full((1, 7, 7), 1 / 49) * (1 + 1e-7 * torch.randn(1, 7, 7))
        assert torch.equal(heatmaps(almost, (32, 32)), torch.zeros(1, 32, 32))

    def test_a_faint_map_is_a_picture(self):
        """A small but real difference is shown."""
        faint = torch.full((1, 7, 7), 1 / 49)
        faint[0, 2, 3] *= 1.01
        assert heatmaps(faint, (7, 7))[0, 2, 3] == 1

    def test_bilinear(self):
        heat = heatmaps(torch.tensor([[[0.0, 1.0]]]), (1, 4))
        assert torch.allclose(heat, torch.tensor([[[0, 0.25, 0.75, 1]]]))

    def test_the_brightest_patch_stays_in_its_place(self):
        maps = torch.zeros(1, 4, 6)
        maps[0, 3, 1] = 1
        heat = heatmaps(maps, (40, 60))[0]
        row, column = divmod(heat.argmax().item(), 60)
        assert (row // 10, column // 10) == (3, 1)


def brightness(pixels):
    return pixels.float().mean(-1)


class TestOverlays:
    def test_shape_and_type(self):
        found = overlays(torch.zeros(2, 8, 12, 3, dtype=torch.uint8), torch.rand(2, 8, 12))
        assert tuple(found.shape) == (2, 8, 12, 3)
        assert found.dtype == torch.uint8

    def test_the_bright_spot_stays_where_the_map_has_it(self):
        heat = torch.zeros(1, 8, 12)
        heat[0, 2, 9] = 1
        found = brightness(overlays(torch.full((1, 8, 12, 3), 128, dtype=torch.uint8), heat))[0]
        assert divmod(found.argmax().item(), 12) == (2, 9)

    def test_the_image_shows_through(self):
        pixels = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
        pixels[0, 1, 1] = 255
        found = brightness(overlays(pixels, torch.full((1, 4, 4), 0.5)))[0]
        assert found[1, 1] > found[0, 0] + 50

    def test_brighter_where_more_is_looked_at(self):
        heat = torch.linspace(0, 1, 16).view(1, 1, 16)
        found = brightness(overlays(torch.full((1, 1, 16, 3), 90, dtype=torch.uint8), heat))[0, 0]
        assert (found.diff() > 0).all()

    @pytest.mark.parametrize("colormap", ["viridis", "magma", "turbo"])
    def test_other_color_maps(self, colormap):
        pixels, heat = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.rand(1, 4, 4)
        assert not torch.equal(overlays(pixels, heat, colormap), overlays(pixels, heat))

    def test_unknown_color_map(self):
        with pytest.raises(VitxError, match="there is no color map 'hot pink'"):
            overlays(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.rand(1, 4, 4), "hot pink")


def columns(count=3, images=2, height=32, width=32):
    shape = (images, height, width, 3)
    return {f"column {i}": torch.randint(0, 256, shape, dtype=torch.uint8) for i in range(count)}


class TestGrid:
    captions = (Caption("cat", 0.9, "cat", right=True), Caption("dog", 0.6, "cat", right=False))

    def test_three_columns_fit_a_card(self):
        picture = grid(columns(3), self.captions)
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 3
        assert picture.shape[1] == 350, "as wide as the card of TensorBoard"

    def test_size_follows_rows_and_columns(self):
        base = grid(columns(2), self.captions)
        wider = grid(columns(3), self.captions)
        taller = grid(columns(2, 3), (*self.captions, Caption("cow", 0.1)))
        assert wider.shape[0] == base.shape[0]
        assert wider.shape[1] > base.shape[1] + TILE_WIDTH
        assert taller.shape[1] == base.shape[1]
        assert taller.shape[0] > base.shape[0] + TILE_WIDTH

    def test_tiles_keep_their_shape(self):
        square = grid(columns(2), self.captions)
        flat = grid(columns(2, height=32, width=64), self.captions)
        assert flat.shape[1] == square.shape[1]
        assert square.shape[0] - flat.shape[0] == 2 * TILE_WIDTH // 2

    def test_the_pictures_are_in_it(self):
        """They lie in their places, row by row and column by column."""
        colors = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 0, 255]]], dtype=torch.uint8)
        tiles = {
            title: color[:, None, None].expand(-1, 32, 32, -1)
            for title, color in zip(("left", "right"), colors.transpose(0, 1), strict=True)
        }
        picture = grid(tiles, self.captions)
        middles = [
            [np.argwhere((picture == color.numpy()).all(-1)).mean(0) for color in row] for row in colors
        ]
        (red, green), (blue, purple) = middles
        assert red[1] == blue[1] < green[1] == purple[1]
        assert red[0] == green[0] < blue[0] == purple[0]

    def test_tile_width(self):
        assert grid(columns(2), self.captions, tile_width=224).shape[1] > 448

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_long_captions_are_cut_to_fit(self, count):
        """Captions may take more lines, but do not reach into the margin."""
        long = [Caption("a very long name of a class " * 5, 0.5, "another long name " * 5)] * 2
        picture = grid(columns(count), long)
        more = len(picture) - len(grid(columns(count), self.captions))
        assert more in {2 * number * LINE for number in range(4)}, "the rows are not alike"
        assert (picture[:, -GAP:] == 255).all()

    @pytest.mark.parametrize("count", [1, 3])
    def test_titles_have_as_many_lines_as_they_need(self, count):
        short, long, two = columns(count), columns(count), columns(count)
        long["input and maps " * 4] = long.pop("column 0")
        two["column\n0"] = two.pop("column 0")
        short["column 0"] = short.pop("column 0")
        short, long, two = (grid(tiles, self.captions) for tiles in (short, long, two))
        lines = (len(long) - len(short)) // LINE + 1
        assert lines > 2
        assert (len(long), len(two)) == (len(short) + (lines - 1) * LINE, len(short) + LINE)
        left = long.shape[1] - GAP - TILE_WIDTH
        assert all((long[line * LINE : (line + 1) * LINE, left:] < 200).any() for line in range(lines))
        assert (long[:, -GAP:] == 255).all()

    def test_a_title_is_written_in_smaller_letters_before_it_is_cut(self):
        said = []
        for text in ("my saliency maps", "my own saliency maps of all heads"):
            canvas = Image.new("RGB", (TILE_WIDTH, LINE), "white")
            draw = ImageDraw.Draw(canvas)
            draw.text = lambda at, shown, color, typeface: said.append((shown, typeface.size))
            write(draw, (0, 0), text, "black", TILE_WIDTH)
        assert said[0][0] == "my saliency maps"
        assert 10 <= said[0][1] < 13
        assert said[1][0].endswith("\N{HORIZONTAL ELLIPSIS}")

    @pytest.mark.parametrize("size", [8, 28, 32, 96, 500])
    def test_words_on_a_picture_are_read_whatever_its_size(self, size):
        """In the grid, they look like those on a picture that is large enough to be drawn at its own size."""
        flat, black = torch.ones(1, 4, 4), torch.zeros(1, size, size, 3, dtype=torch.uint8)
        found, wanted = (
            grid({"map": Layer(flat).marked(pictures)}, [Caption("")])[2 * LINE :][:TILE_WIDTH, GAP:-GAP]
            for pictures in (black, torch.zeros(1, 224, 224, 3, dtype=torch.uint8))
        )
        assert wanted.max() > 200
        assert np.corrcoef(found.flatten(), wanted.flatten())[0, 1] > 0.8

    def test_right_and_wrong_look_different_without_color(self):
        tiles = columns(3, 1)
        right, wrong = (
            np.abs(grid(tiles, [caption]).astype(int).mean(-1) - 255) > 100
            for caption in (Caption("cat", 0.9, "cat", right=True), Caption("cat", 0.9))
        )
        assert (right != wrong).any()

    def test_the_legend_shows_the_color_map(self):
        tiles = {"only": torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)}
        for colormap in ("inferno", "viridis"):
            picture = grid(tiles, [Caption("cat", 1.0)], colormap=colormap)
            found = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
            first, *_, last = palette(colormap).tolist()
            assert {tuple(first), tuple(last)} <= found

    @pytest.mark.parametrize(
        ("note", "lines"), [("", 0), ("colors guessed", 0), ("channels 0, 1, 2 of 4, stretched; " * 3, 2)]
    )
    def test_a_note_that_is_too_long_for_the_legend_has_lines_of_its_own(self, note, lines):
        tiles, caption = columns(3, 1), [Caption("cat", 1.0)]
        plain, noted = grid(tiles, caption), grid(tiles, caption, note=note)
        assert len(noted) == len(plain) + lines * LINE
        for line in range(lines):
            top = len(plain) + line * LINE
            assert (noted[top - LINE // 2 : top + LINE // 2] < 200).any(), "an empty line"
        assert (noted[:, -GAP:] == 255).all()

    def test_unknown_color_map(self):
        with pytest.raises(VitxError, match="there is no color map 'x'"):
            grid(columns(1), self.captions, colormap="x")


class TestBeside:
    def test_each_picture_is_below_its_heading(self):
        pictures = [np.full((20, 200, 3), value, np.uint8) for value in (10, 60)]
        drawn = beside({"demo\nstep 4": pictures[0], "a long name of a run " * 3: pictures[1]})
        top = 2 * LINE + GAP
        assert (drawn[top:, :200] == 10).all()
        assert (drawn[:LINE, :200] < 100).any()
        assert (drawn[LINE : 2 * LINE, :200] < 100).any()
        second = drawn[:, -200:]
        assert (second[LINE + GAP : LINE + GAP + 20] == 60).all()
        assert (second[: LINE + GAP, -GAP:] == 255).all(), "a heading reaches into the margin"


class TestExplanation:
    @pytest.fixture(autouse=True)
    def _explained(self):
        family = models.FAMILIES["not square"]
        self.images = family.images()
        self.found = explain(models.built("not square"), self.images)

    def test_heatmaps(self):
        heat = self.found.heatmaps()
        assert tuple(heat.shape) == (2, 24, 40)
        assert heat.min() == 0
        assert heat.max() == 1
        assert torch.equal(heat, heatmaps(self.found.maps, (24, 40)))
        assert tuple(self.found.heatmaps((6, 8)).shape) == (2, 6, 8)

    def test_overlays(self):
        found = self.found.overlays()
        assert tuple(found.shape) == (2, 24, 40, 3)
        assert torch.equal(found, overlays(self.found.pixels(), self.found.heatmaps()))
        assert not torch.equal(found, self.found.overlays(colormap="viridis"))
        darker = self.found.overlays(self.images, mean=(0.0,), std=(0.1,))
        assert torch.equal(
            darker, overlays(self.found.pixels(mean=(0.0,), std=(0.1,)), self.found.heatmaps())
        )

    def test_overlays_on_larger_images(self):
        assert tuple(self.found.overlays(torch.rand(2, 3, 48, 80)).shape) == (2, 48, 80, 3)

    def test_overlays_on_another_number_of_images(self):
        with pytest.raises(VitxError, match="3 images for 2 maps"):
            self.found.overlays(torch.rand(3, 3, 24, 40))

    def test_overlays_on_one_image_without_a_batch(self):
        with pytest.raises(VitxError, match=r"found \(3, 24, 40\)"):
            self.found.overlays(torch.rand(3, 24, 40))
