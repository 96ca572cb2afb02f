"""Explanations are drawn, saved, loaded and sliced."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from tests import models
from vitx import Explanation, VitxError, explain, load

# In the range of the model's normalized pixels.
IMAGES = models.FAMILIES["deit"].images(3).sigmoid() * 3.5 - 1.75


@pytest.fixture(scope="module")
def found():
    return explain(models.built("deit"), IMAGES, "grad_rollout", target=[1, 2, 3])


def test_the_models_normalization_is_undone(found):
    config = models.built("deit").pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    wanted = ((IMAGES * std + mean).clamp(0, 1) * 255).round().movedim(1, -1)
    assert torch.equal(found.pixels().float(), wanted)
    given = ((IMAGES * 0.5).clamp(0, 1) * 255).round().movedim(1, -1)
    assert torch.equal(found.pixels(mean=[0.0], std=[0.5]).float(), given)


def test_images_that_were_not_kept_must_be_given(found):
    bare = found.without_images()
    for call in (bare.pixels, bare.overlays, bare.picture, bare.overview):
        with pytest.raises(VitxError, match="the images were not kept"):
            call()
        assert np.array_equal(call(IMAGES), getattr(found, call.__name__)())


def test_all_that_draws_takes_the_same_arguments(found):
    for name in ("pixels", "overlays", "picture", "overview"):
        call = getattr(found, name)
        for options in ({"mean": [0.2], "std": [0.9]}, {"bands": [2]}):
            assert not np.array_equal(call(**options), call()), (name, options)
        if name != "pixels":
            assert not np.array_equal(call(colormap="viridis"), call())


def test_host_memory_keeps_all_of_it(found):
    for there in (found.cpu(), found.to("cpu"), found.to(torch.device("cpu"))):
        assert torch.equal(there.images, IMAGES)
        assert np.array_equal(there.picture(), found.picture())
        assert there.viewer is found.viewer
    assert found.to("meta").images.device.type == "meta"


def test_a_picture_of_both_signs():
    found = explain(models.built("deit"), IMAGES, "evidence", target=[1, 2, 3])
    drawn = found.overlays(signed=True).int()
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
    with pytest.raises(VitxError, match="no sign"):
        found.overlays(signed=True)


def test_what_is_saved_as_arrays_is_loaded_again(tmp_path):
    found = explain(models.built("deit"), IMAGES, "evidence", target=[1, 2, 3])
    found = replace(found, captions=["one", "two", "three"], boxes=torch.tensor([[1.0, 2.0, 9.0, 9.5]] * 3))
    found = replace(found, class_names=["cat", "dog"])
    found.save(tmp_path / "deep" / "a.npz")
    again = load(tmp_path / "deep" / "a.npz")
    for name, value in vars(found).items():
        kept = getattr(again, name)
        if name in ("images", "viewer"):
            assert kept is None
        elif isinstance(value, torch.Tensor):
            assert torch.equal(kept, value), name
            assert kept.dtype == value.dtype
        else:
            assert kept == (tuple(value) if isinstance(value, list) else value), name
    assert (again.method, again.image_size) == ("evidence", (32, 32))
    assert np.array_equal(again.picture(IMAGES, signed=True), found.picture(signed=True))
    spectrogram = replace(found, channels=None, target=None)
    spectrogram.save(tmp_path / "b.npz")
    assert load(tmp_path / "b.npz").channels is load(tmp_path / "b.npz").target is None


@pytest.mark.parametrize("classes", [3, 1000])
def test_the_names_that_a_model_declares(classes):
    names = [f"person {index}" for index in range(classes)]
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**small, image_size=32, patch_size=8, id2label=dict(enumerate(names)))
    found = explain(ViTForImageClassification(config), IMAGES, "evidence")
    assert np.array_equal(found.picture(), found.picture(class_names=names))
    assert np.array_equal(found.overview(), found.overview(class_names=names))
    assert not np.array_equal(found.picture(), found.picture(class_names=["cat"] * classes))


def test_other_files_are_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", maps=np.ones(3))
    (tmp_path / "b.npz").write_text("no archive")
    others = {"b": "could not be read", "c": r"there is no file .*c\.npz$"}
    for name, said in {"a": "is not a saved explanation: it holds maps", **others}.items():
        with pytest.raises(VitxError, match=said):
            load(tmp_path / f"{name}.npz")


def test_saved_as_a_picture(found, tmp_path):
    found.save(tmp_path / "a.png")
    drawn = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(drawn, found.picture())
    assert drawn.shape == (19 + 3 * (19 + 224 + 5) + 38, 5 + 2 * (224 + 5), 3)


@pytest.mark.parametrize("name", ["a.tif", "a"])
def test_other_kinds_of_file(found, tmp_path, name):
    with pytest.raises(VitxError, match=r"saved as \.png, .*\.html, \.gif or \.npz"):
        found.save(tmp_path / name)


def test_a_place_that_cannot_be_written(found, tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(VitxError, match="could not be written"):
        found.save(tmp_path / "file" / "a.png")


def test_a_notebook_shows_it(found):
    assert np.array_equal(np.asarray(Image.open(BytesIO(found._repr_png_()))), found.picture())
    assert found.without_images()._repr_png_() is None


def test_a_part(found):
    for part in (slice(1, 2), 1, -2, [1], torch.tensor([1]), torch.tensor([False, True, False])):
        one = found[part]
        assert len(one) == 1
        assert one.target.tolist() == [2]
        assert torch.equal(one.images, IMAGES[1:2])
        assert torch.equal(one.overlays(), found.overlays()[1:2])
    assert found[[2, 0]].target.tolist() == [3, 1]
    with pytest.raises(IndexError):
        found[3]


def test_iterating_gives_explanations_of_single_images(found):
    said = replace(found, captions=["a", "b", "c"])
    assert [one.captions for one in said] == [["a"], ["b"], ["c"]]
    assert [one.target.tolist() for one in found] == [[1], [2], [3]]
    assert all(np.array_equal(one.picture(), found[[row]].picture()) for row, one in enumerate(found))
    assert repr(found[0]) == "Explanation('grad_rollout', maps (1, 4, 4) of images (32, 32))"


@pytest.mark.parametrize(
    ("part", "paired"), [(slice(2), True), ([2, 3, 0, 1], True), (0, False), ([1, 0], False), ([1, 2], False)]
)
def test_pairs_stay_pairs_where_both_are_there(part, paired):
    maps = torch.rand(4, 2, 2)
    found = Explanation(maps, torch.zeros(4, 3), None, (4, 4), torch.rand(4, 3, 4, 4), paired=True)
    assert found[part].paired == paired
    assert found[part].picture().ndim == 3


@pytest.mark.parametrize(
    ("name", "start"),
    [("a.PNG", b"\x89PNG"), ("a.Npz", b"PK"), ("a.JPG", b"\xff\xd8"), ("a.webp", b"RIFF")],
)
def test_suffixes(found, tmp_path, name, start):
    found.save(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_picture_is_saved_with_the_options_of_a_picture(found, tmp_path):
    found.save(tmp_path / "a.png", class_names=["cat"] * 10)
    drawn = found.picture(class_names=["cat"] * 10)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), drawn)
    assert not np.array_equal(found.picture(), drawn)
