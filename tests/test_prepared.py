"""Files, PIL images and arrays are prepared for the model; loaders are read batch by batch."""

import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitx
from tests import models
from vitx import VitxError
from vitx.inputs.prepared import prepared, preprocessing_of
from vitx.inputs.preprocessing import Preprocessing, normalization

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def model():
    return models.spread(
        timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=48, num_classes=5)
    ).eval()


@pytest.fixture(scope="module")
def wanted(model):
    transform = create_transform(**resolve_model_data_config(model))
    return transform(Image.fromarray(PIXELS))[None]


def as_tensor(model, images):
    return prepared(model, images)[0]


def test_each_kind_is_prepared_as_timm_does(model, wanted, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    tensor = torch.from_numpy(PIXELS).movedim(-1, 0)
    for image in (path, str(path), Image.fromarray(PIXELS), PIXELS, tensor):
        assert torch.equal(as_tensor(model, image), wanted)
        assert torch.equal(as_tensor(model, [image, image]), wanted.expand(2, -1, -1, -1))
    for stack in (np.stack([PIXELS] * 3), torch.stack([tensor] * 3)):
        assert torch.equal(as_tensor(model, stack), wanted.expand(3, -1, -1, -1))


def test_gray_and_transparent_arrays(model):
    gray = as_tensor(model, PIXELS[..., 0])
    assert torch.equal(gray, as_tensor(model, PIXELS[..., :1]))
    assert torch.equal(gray, as_tensor(model, np.repeat(PIXELS[..., :1], 3, -1)))
    clear = np.concatenate([PIXELS, np.zeros((40, 60, 1), np.uint8)], -1)
    assert torch.equal(as_tensor(model, clear), as_tensor(model, np.full_like(PIXELS, 255)))


def test_a_file_name_is_a_whole_program(model, wanted, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "cat.png")
    found = vitx.explain(model, tmp_path / "cat.png")
    assert found.maps.shape == (1, 14, 14)
    assert torch.equal(found.maps, vitx.explain(model, wanted).maps)


def test_the_models_precision_is_used():
    model = timm.create_model("deit_tiny_patch16_224", depth=1, embed_dim=48, num_classes=5).double().eval()
    assert vitx.explain(model, PIXELS).maps.dtype == torch.float64


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        ("absent.jpg", "there is no file absent.jpg"),
        (["absent.jpg"], "there is no file absent.jpg"),
        ([], "images must be a floating-point tensor .*, found list of 0"),
        (PIXELS / 255, r"tensor .*, uint8 arrays \(H, W, 3\), .*found ndarray \(40, 60, 3\) of float64"),
        (PIXELS.transpose(2, 0, 1), r"uint8 arrays \(H, W, 3\), .*found ndarray \(3, 40, 60\) of uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "images must be floating point"),
        (torch.zeros(7, 9, 9, dtype=torch.uint8), "images must be"),
        (7, "images must be a floating-point tensor .*, found int"),
    ],
)
def test_what_is_no_image(model, images, sentence):
    with pytest.raises(VitxError, match=sentence):
        vitx.explain(model, images)


def test_tensors_that_were_not_normalized_are_warned_of(model, wanted):
    with pytest.warns(
        UserWarning, match="takes normalized images, and these have values up to 2..: normalize"
    ):
        vitx.explain(model, torch.rand(1, 3, 224, 224) * 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vitx.explain(model, wanted)
        vitx.explain(nn.Sequential(model), wanted * 255)  # it may normalize them itself


def test_a_model_that_does_not_say_how_it_wants_them():
    with pytest.raises(VitxError, match="the model does not declare its preprocessing"):
        vitx.explain(nn.Linear(2, 2), PIXELS)


class TestLoader:
    IMAGES = models.FAMILIES["deit"].images(5)

    @pytest.mark.parametrize("batch", ["pairs", "mapping", "images"])
    def test_equals_one_batch(self, batch):
        data = TensorDataset(self.IMAGES, torch.arange(5))
        if batch == "mapping":
            data = [{"pixel_values": image, "label": 1} for image in self.IMAGES]
        if batch == "images":
            data = list(self.IMAGES)
        found = vitx.explain(models.built("deit"), DataLoader(data, 2), "grad_rollout", target=2)
        wanted = vitx.explain(models.built("deit"), self.IMAGES, "grad_rollout", target=2)
        assert torch.allclose(found.maps, wanted.maps, rtol=1e-4, atol=1e-7)
        assert torch.allclose(found.logits, wanted.logits, rtol=1e-4, atol=1e-6)
        assert found.target.tolist() == [2] * 5
        assert found.images is None

    def test_refusals(self):
        model = models.built("deit")
        with pytest.raises(VitxError, match="for a DataLoader, target must be None"):
            vitx.explain(model, DataLoader(self.IMAGES, 2), "grad_rollout", target=[1] * 5)
        with pytest.raises(VitxError, match="the DataLoader is empty"):
            vitx.explain(model, DataLoader([], 2))
        with pytest.raises(VitxError, match="batches of the DataLoader must be images"):
            vitx.explain(model, DataLoader([{"text": 3}], 2))


class TestPreprocessing:
    def test_what_is_given_stands_over_what_is_declared(self, model):
        found = preprocessing_of(model, size=96, mean=[0.5], std=[0.1, 0.2, 0.3])
        assert (found.size, found.mean, found.std) == ((96, 96), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))
        with pytest.raises(VitxError, match="mean has 2 values"):
            preprocessing_of(model, mean=[0.5, 0.5])

    def test_a_model_that_declares_nothing(self):
        found = preprocessing_of(models.torchvision_vit(), size=32, mean=[0.5], std=[0.25])
        assert (found.size, found.mean, found.std, found.crop_pct) == ((32, 32), (0.5,) * 3, (0.25,) * 3, 1.0)
        assert found(Image.new("RGB", (40, 60), "white")).amin() == pytest.approx(2)

    def test_a_module_around_the_model(self, model):
        assert preprocessing_of(nn.Sequential(nn.Identity(), model)) == preprocessing_of(model)

    def test_mean_and_std_alone_are_enough_to_undo_a_normalization(self):
        part = nn.Identity()
        part.pretrained_cfg = {"mean": (0.1,), "std": (0.2,)}
        assert normalization(nn.Sequential(part)) == ((0.1,), (0.2,))
        assert normalization(nn.Identity()) == ((0.0,), (1.0,))

    def test_the_size_that_the_model_was_made_for(self):
        model = timm.create_model("deit_tiny_patch16_224", img_size=(64, 96), depth=1)
        assert preprocessing_of(model).size == (64, 96)

    @pytest.mark.parametrize("size", [(640, 320), (100, 400), (333, 333), (9, 900)])
    def test_proportions_are_kept(self, size):
        prepare = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, multiple=16, keep_aspect=True)
        _, height, width = prepare(Image.new("RGB", size)).shape
        assert height % 16 == width % 16 == 0
        assert abs(np.log(width / height * size[1] / size[0])) < (0.55 if 9 in size else 0.1)
        assert height * width <= 2 * 224 * 224

    def test_proportions_of_a_model_with_one_size(self, model):
        with pytest.raises(VitxError, match="takes images of one size only"):
            preprocessing_of(model, keep_aspect=True)
        dynamic = timm.create_model("deit_tiny_patch16_224", depth=1, dynamic_img_size=True)
        assert preprocessing_of(dynamic, keep_aspect=True).multiple == 16


def test_files_and_arrays_for_a_model_of_one_channel(tmp_path):
    model = models.deit(in_chans=1).eval()
    gray = np.full((32, 32), 60, np.uint8)
    gray[:, 16:] = 200
    Image.fromarray(gray).convert("RGB").save(tmp_path / "scan.png")
    found = [vitx.explain(model, given) for given in (tmp_path / "scan.png", gray, gray[..., None])]
    assert found[0].images.shape == (1, 1, 32, 32)
    assert all(torch.equal(one.maps, found[0].maps) for one in found)
    shown = found[0].pixels()[0, 16, :, 0].tolist()
    assert abs(shown[0] - 60) <= 1
    assert abs(shown[-1] - 200) <= 1


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_an_array_of_channels_goes_the_way_of_a_picture(crop_mode):
    smooth = Image.fromarray(PIXELS).resize((300, 200), Image.Resampling.BICUBIC)
    channels = np.ascontiguousarray(np.asarray(smooth, np.float32).transpose(2, 0, 1) / 255)
    prepare = Preprocessing((96, 96), (0.5,) * 3, (0.25,) * 3, crop_pct=0.9, crop_mode=crop_mode)
    assert torch.allclose(prepare(channels), prepare(smooth), atol=0.2)  # PIL rounds each step


def test_files_are_none_for_a_model_of_many_channels():
    with pytest.raises(VitxError, match="mean has 3 values, and the model takes 13 channels: give a tensor"):
        vitx.explain(models.deit(in_chans=13).eval(), PIXELS)
