"""What can be done with an explanation: seen, saved, cut."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from tests import models
from vitx import VitxError, explain

# Of values that the model's normalisation makes of pixels.
IMAGES = models.FAMILIES["deit"].images(3).sigmoid() * 3.5 - 1.75


@pytest.fixture(scope="module")
def found():
    return explain(models.built("deit"), IMAGES, "grad_rollout", target=[1, 2, 3])


def test_the_models_normalisation_is_undone(found):
    config = models.built("deit").pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    wanted = ((IMAGES * std + mean).clamp(0, 1) * 255).round().movedim(1, -1)
    assert torch.equal(found.pixels().float(), wanted)
    given = ((IMAGES * 0.5).clamp(0, 1) * 255).round().movedim(1, -1)
    assert torch.equal(found.pixels(mean=[0.0], std=[0.5]).float(), given)


def test_images_that_were_not_kept_must_be_given(found):
    for call in (found.cpu().pixels, found.cpu().overlays):
        with pytest.raises(VitxError, match="the images were not kept"):
            call()
    assert torch.equal(found.cpu().overlays(IMAGES), found.overlays())


def test_a_picture_of_both_signs():
    found = explain(models.built("deit"), IMAGES, "evidence", target=[1, 2, 3])
    drawn = found.signed_overlays().int()
    heat = torch.nn.functional.interpolate(found.signed[:, None], (32, 32), mode="bilinear")[:, 0]
    far = heat.abs() > 0.5 * heat.abs().amax((1, 2), keepdim=True)
    redder = drawn[..., 0] > drawn[..., 2]
    assert torch.equal(redder[far], heat[far] > 0)
    assert found.picture(signed=True).shape == found.picture().shape
    assert torch.equal(found[1:].signed, found.signed[1:])
    assert torch.equal(found.cpu().signed, found.signed)


def test_no_sign_no_picture_of_it(found):
    with pytest.raises(VitxError, match="the maps of grad_rollout have no sign: use evidence"):
        found.picture(signed=True)


def test_saved_as_arrays(found, tmp_path):
    found.save(tmp_path / "deep" / "a.npz")
    with np.load(tmp_path / "deep" / "a.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["maps"], found.maps)
        assert np.array_equal(arrays["logits"], found.logits)
        assert arrays["target"].tolist() == [1, 2, 3]


def test_saved_as_a_picture(found, tmp_path):
    found.save(tmp_path / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(drawn, found.picture())
    assert drawn.shape == (19 + 3 * (19 + 224 + 5) + 38, 5 + 2 * (224 + 5), 3)


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_other_kinds_of_file(found, tmp_path, name):
    with pytest.raises(VitxError, match=r"saved as \.png, \.html, \.gif or \.npz"):
        found.save(tmp_path / name)


def test_a_place_that_cannot_be_written(found, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(VitxError, match="could not be written"):
        found.save(tmp_path / "file" / "a.png")


def test_a_notebook_shows_it(found):
    assert np.array_equal(np.asarray(Image.open(BytesIO(found._repr_png_()))), found.picture())
    assert found.cpu()._repr_png_() is None


def test_a_part(found):
    part = found[1:2]
    assert len(part) == 1
    assert part.target.tolist() == [2]
    assert torch.equal(part.overlays(), found.overlays()[1:2])


@pytest.mark.parametrize("name", ["a.PNG", "a.Npz"])
def test_suffixes_in_capitals(found, tmp_path, name):
    found.save(tmp_path / name)
    assert (tmp_path / name).read_bytes()[:2] == {"a.PNG": b"\x89P", "a.Npz": b"PK"}[name]
