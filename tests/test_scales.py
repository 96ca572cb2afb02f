"""The normalization of images, as found in data sets, transforms and modules."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split
from torchvision import transforms
from torchvision.transforms import v2

from tests.lightning_models import SmallClassifier
from vitx.callbacks.lightning import LightningHost
from vitx.pictures.colors import BYTES, GUESSED, UNSCALED, choose_colors
from vitx.watch.data_sets import likely_scales, scales_in

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
MODULE_LEVEL = transforms.Compose([transforms.Normalize(MEAN, STD)])


class Pictures(Dataset):
    def __init__(self, transform=None):
        self.transform = transform
        self.files = ["a.jpg"] * 100_000

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return index


class OfTheClass(Pictures):
    shared = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __init__(self):
        pass


def albumentations():
    package = pytest.importorskip("albumentations", reason="albumentations is not installed")
    return package.Compose([package.Normalize(MEAN, STD)])


def kornia(kind):
    package = pytest.importorskip("kornia", reason="kornia is not installed")
    values = torch.tensor(MEAN), torch.tensor(STD)
    return {
        "augmentation": lambda: nn.Sequential(package.augmentation.Normalize(*values)),
        "several": lambda: package.augmentation.AugmentationSequential(
            package.augmentation.Normalize(*values)
        ),
        "enhance": lambda: package.enhance.Normalize(*values),
    }[kind]()


def processor(**options):
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    return package.ViTImageProcessor(image_mean=MEAN, image_std=STD, **options)


HOLDERS = {
    "torchvision": lambda: Pictures(MODULE_LEVEL),
    "torchvision v2": lambda: Pictures(v2.Compose([v2.Normalize(MEAN, STD)])),
    "subset": lambda: Subset(Pictures(transforms.Normalize(MEAN, STD)), [1]),
    "several sets": lambda: ConcatDataset([Pictures(), Pictures(transforms.Normalize(MEAN, STD))]),
    "random split": lambda: random_split(Pictures(transforms.Normalize(MEAN, STD)), [4, 4])[1],
    "timm": lambda: Pictures(create_transform(224, mean=MEAN, std=STD)),
    "timm, training": lambda: Pictures(create_transform(224, is_training=True, mean=MEAN, std=STD)),
    "albumentations": lambda: Pictures(albumentations()),
    "kornia, augmentation": lambda: Pictures(kornia("augmentation")),
    "kornia, several": lambda: Pictures(kornia("several")),
    "kornia, enhance": lambda: Pictures(kornia("enhance")),
    "the class": OfTheClass,
    "image processor": lambda: Pictures(processor()),
    "a method": lambda: MODULE_LEVEL.__call__,
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_normalization(holder):
    ((mean, std),) = list(scales_in(HOLDERS[holder]()))
    assert mean == pytest.approx(MEAN, abs=1e-6)
    assert std == pytest.approx(STD, abs=1e-6)


@pytest.mark.parametrize(
    "value", [None, Pictures(), SimpleNamespace(mean=0.5), SimpleNamespace(mean="x", std="y"), 3, [1, 2]]
)
def test_what_holds_none(value):
    assert list(scales_in(value)) == []


def test_an_image_processor_that_does_not_normalize_holds_none():
    assert list(scales_in(Pictures(processor(do_normalize=False)))) == []


class Lazy:
    """An object that raises on missing attributes, as lazily imported modules do."""

    def __getattr__(self, name):
        raise ImportError(name)


def test_nothing_is_computed_on_the_way():
    class Counting(Pictures):
        @property
        def mean(self):
            raise AssertionError("a mean was computed")

        std = mean

    holder = Counting(Lazy())
    holder.itself = holder
    assert list(scales_in(holder)) == []


def scales(module, images, of_data=(), datamodule=None):
    host = LightningHost(pl.Trainer(logger=False, barebones=True), module)
    host.trainer.datamodule = datamodule
    return list(likely_scales(module, images, of_data, host.normalizers()))


class Declares(SmallClassifier):
    """A model that declares another normalization."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.backbone.pretrained_cfg = {"mean": (0.7,) * 3, "std": (0.1,) * 3}


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IN_HOOK = v2.Normalize(MEAN, STD)(IMAGES)


class TestOrder:
    def test_the_data_comes_before_the_model(self):
        found = scales(Declares(), v2.Normalize((0.7,) * 3, (0.1,) * 3)(IMAGES), [(MEAN, STD)])
        assert found == [(MEAN, STD), UNSCALED, ((0.7,) * 3, (0.1,) * 3)]

    def test_hooks_of_the_module_and_of_the_data_module(self):
        module = Declares()
        module.prepare = v2.Normalize(MEAN, STD)
        assert scales(module, IN_HOOK)[1] == (MEAN, STD)
        datamodule = SimpleNamespace(on_gpu=nn.Sequential(v2.Normalize(MEAN, STD)))
        assert scales(Declares(), IN_HOOK, datamodule=datamodule)[1] == (MEAN, STD)


def colors(images, *, of_data=(), holds=None, declares=None):
    module = SmallClassifier()
    module.normalize = holds and v2.Normalize(*holds)
    module.backbone = nn.Linear(1, 1)
    module.backbone.pretrained_cfg = declares and dict(zip(("mean", "std"), declares, strict=True))
    return choose_colors(images, scales(module, images, of_data))


@pytest.mark.parametrize("images", [IMAGES, IMAGES * 1.02 - 0.01], ids=["from 0 to 1", "resampled"])
@pytest.mark.parametrize("where", ["holds", "declares"])
def test_what_the_forward_normalizes_stays_raw(where, images):
    assert colors(images, **{where: IMAGENET}).scale == UNSCALED


def test_whole_numbers_stay_raw():
    images = (IMAGES * 255).round()
    found = colors(images, holds=IMAGENET)
    assert (found.scale, str(found)) == (BYTES, "colors as they are")
    assert torch.equal(found.pixels(images), images.permute(0, 2, 3, 1).byte())


@pytest.mark.parametrize("where", ["holds", "declares"])
def test_a_scale_that_did_not_make_the_images_is_not_taken(where):
    assert colors(2 * IMAGES - 1, **{where: IMAGENET}).note == GUESSED
    normalized = v2.Normalize(*IMAGENET)(IMAGES)
    pixels = colors(normalized, **{where: IMAGENET}).pixels(normalized)
    assert (pixels.float() / 255 - IMAGES.permute(0, 2, 3, 1)).abs().amax() < 0.01


DULL = 0.3 * IMAGES
STANDARDIZED = (DULL - DULL.mean((1, 2, 3), keepdim=True)) / DULL.std((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("images", [STANDARDIZED, (IMAGES - 0.5) / 0.25], ids=["one by one", "otherwise"])
@pytest.mark.parametrize("where", ["holds", "declares"])
def test_a_scale_that_merely_fits_is_not_taken(where, images):
    assert colors(images, **{where: IMAGENET}).note == GUESSED


def test_what_the_data_says_is_believed_of_pale_images():
    pale = v2.Normalize(*IMAGENET)(0.4 + 0.2 * IMAGES)
    assert colors(pale, of_data=[IMAGENET]).scale == IMAGENET
