"""The colors in which the inputs of a model are shown."""

import pytest
import torch

from tests import models
from vitx import VitxError, explain
from vitx.pictures.colors import GUESSED, UNSCALED, Colors, choose_colors

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalized(pixels, mean, std):
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


@pytest.mark.parametrize(("mean", "std"), [IMAGENET, ((0.5,), (0.5,)), UNSCALED])
def test_undoes_the_normalization_exactly(mean, std):
    pixels = torch.randint(0, 256, (2, 9, 7, 3), dtype=torch.uint8)
    images = normalized(pixels, mean, std)
    found = choose_colors(images, [(mean, std)])
    assert found == Colors((0, 1, 2), (mean, std))
    assert found.pixels(images).dtype == torch.uint8
    assert torch.equal(found.pixels(images), pixels)


def test_all_values():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(Colors((0, 1, 2), IMAGENET).pixels(normalized(pixels, *IMAGENET)), pixels)


def test_takes_the_first_scale_that_brings_the_images_into_their_range():
    pixels = torch.randint(0, 256, (2, 9, 7, 3), dtype=torch.uint8)
    images = normalized(pixels, *IMAGENET)
    found = choose_colors(images, [UNSCALED, None, ((0.1,) * 2, (0.1,) * 2), IMAGENET, ((0.5,), (0.5,))])
    assert found.scale == IMAGENET


def test_guesses_where_no_scale_fits():
    images = torch.linspace(-700, 300, 3 * 1000).view(1, 3, 25, 40)
    found = choose_colors(images, [UNSCALED, IMAGENET])
    assert (found.scale, found.note) == (None, GUESSED)
    pixels = found.pixels(images)
    assert pixels.flatten(1, 2).amin(1).tolist() == [[0, 0, 0]]
    assert pixels.flatten(1, 2).amax(1).tolist() == [[255, 255, 255]]
    middle = pixels[0, :, :, 1].flatten()[500]
    assert abs(int(middle) - 128) <= 2


def test_a_spectrogram_has_no_colors_to_guess():
    images = torch.linspace(-7, 3, 1000).view(1, 1, 25, 40)
    found = choose_colors(images, [UNSCALED], colored=False)
    assert (found.scale, found.note, str(found)) == (None, "", "")
    assert found.pixels(images).unique().numel() > 200


def test_a_constant_image_of_no_known_scale():
    images = torch.full((1, 3, 4, 4), 77.0)
    assert (choose_colors(images, []).pixels(images) == 0).all()


class TestChannels:
    def test_one(self):
        pixels = torch.randint(0, 256, (2, 5, 5, 1), dtype=torch.uint8)
        images = normalized(pixels, (0.13,), (0.3,))
        found = choose_colors(images, [((0.13,), (0.3,))])
        assert torch.equal(found.pixels(images), pixels.expand(-1, -1, -1, 3))

    def test_one_in_a_model_that_declares_three(self):
        pixels = torch.randint(0, 256, (2, 5, 5, 1), dtype=torch.uint8)
        mean, std = ((sum(values) / 3,) for values in IMAGENET)
        images = normalized(pixels, mean, std)
        assert torch.equal(choose_colors(images, [IMAGENET]).pixels(images), pixels.expand(-1, -1, -1, 3))

    def test_two_are_shown_as_their_mean(self):
        images = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        found = choose_colors(images, [UNSCALED])
        assert found.note == "mean of 2 channels, stretched"
        assert found.pixels(images)[0, 0].tolist() == [[0, 0, 0], [255, 255, 255]]

    def test_the_first_three_of_many(self):
        images = torch.rand(2, 13, 8, 8) * 4000
        found = choose_colors(images, [IMAGENET])
        assert found.note == "channels 0, 1, 2 of 13, stretched (bands= shows others)"
        assert torch.equal(found.pixels(images), found.pixels(images[:, :3]))

    def test_chosen_bands(self):
        images = torch.rand(2, 13, 8, 8)
        found, turned = (choose_colors(images, [UNSCALED], bands) for bands in ((3, 2, 1), (1, 2, 3)))
        assert found.note == "bands 3, 2, 1, stretched"
        assert torch.equal(found.pixels(images), turned.pixels(images).flip(3))
        darkest = images[:, 3].flatten().argmin()
        assert found.pixels(images)[..., 0].flatten()[darkest] == 0
        gray = choose_colors(images, [UNSCALED], (12,)).pixels(images)
        assert torch.equal(gray[..., 0], gray[..., 2])

    @pytest.mark.parametrize("bands", [(0, 1), (3,), (-1, 0, 1), ()])
    def test_bands_that_are_not_there(self, bands):
        with pytest.raises(VitxError, match="bands must be one or three channels, from 0 to 2"):
            choose_colors(torch.rand(1, 3, 4, 4), [], bands)

    def test_no_images(self):
        with pytest.raises(VitxError, match="images must be"):
            choose_colors(torch.rand(3, 4, 4), [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    images = torch.ones(1, 3, 2, 2, dtype=dtype, requires_grad=True)
    assert (choose_colors(images, [UNSCALED]).pixels(images) == 255).all()


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [
        ((0, 0), (1, 1, 1), "mean has 2 values for 3 channels"),
        ((0, 0, 0), (1, 1), "std has 2 values for 3 channels"),
        ((), (1,), "mean has 0 values"),
    ],
)
def test_given_values_that_do_not_fit(mean, std, sentence):
    with pytest.raises(VitxError, match=sentence):
        choose_colors(torch.rand(1, 3, 4, 4), [], given=(mean, std))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_an_explanation_of_any_number_of_channels_is_a_picture(channels, tmp_path):
    model = models.deit(in_chans=channels)
    found = explain(model, torch.rand(2, channels, 32, 32))
    found.save(tmp_path / "maps.png")
    assert found.pixels().shape == (2, 32, 32, 3)
    assert (tmp_path / "maps.png").stat().st_size > 1000
