"""Finds how images were normalised."""

import functools
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
from vitx.pictures.colours import UNSCALED
from vitx.watch.scales import held_by, likely_scales, true_colours

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


class InTheMethod(Pictures):
    def __getitem__(self, index):
        return MODULE_LEVEL(torch.rand(3, 4, 4))


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


def by_a_partial():
    return functools.partial(lambda batch, more: [MODULE_LEVEL(image) for image in batch], more=1)


def by_a_closure():
    kept = transforms.Normalize(MEAN, STD)
    return lambda image: kept(image)


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
    "what a method uses": InTheMethod,
    "a function's own": lambda: Pictures(by_a_closure()),
    "a collate function": by_a_partial,
    "a method": lambda: MODULE_LEVEL.__call__,
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_normalisation(holder):
    ((mean, std),) = list(held_by(HOLDERS[holder]()))
    assert mean == pytest.approx(MEAN, abs=1e-6)
    assert std == pytest.approx(STD, abs=1e-6)


@pytest.mark.parametrize(
    "value", [None, Pictures(), SimpleNamespace(mean=0.5), SimpleNamespace(mean="x", std="y"), 3, [1, 2]]
)
def test_what_holds_none(value):
    assert list(held_by(value)) == []


class Lazy:
    """Raises where it is asked for what it has not, as lazily imported modules do."""

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
    assert list(held_by(holder)) == []


def scales(module, images, of_data=(), datamodule=None):
    host = LightningHost(pl.Trainer(logger=False, barebones=True), module, ".")
    host.trainer.datamodule = datamodule
    return list(likely_scales(module, images, of_data, host.normalisers()))


class Declares(SmallClassifier):
    """A model that declares another normalisation."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.backbone.pretrained_cfg = {"mean": (0.7,) * 3, "std": (0.1,) * 3}


class TestOrder:
    images = torch.rand(4, 3, 4, 4)

    def test_the_data_comes_before_the_model(self):
        found = scales(Declares(), self.images - 0.5, [(MEAN, STD)])
        assert found[0] == (MEAN, STD)
        assert ((0.7,) * 3, (0.1,) * 3) in found

    def test_hooks_of_the_module_and_of_the_data_module(self):
        module = Declares()
        module.prepare = v2.Normalize(MEAN, STD)
        assert scales(module, self.images - 0.5)[0] == (MEAN, STD)
        datamodule = SimpleNamespace(on_gpu=nn.Sequential(v2.Normalize(STD, MEAN)))
        assert scales(Declares(), self.images - 0.5, datamodule=datamodule)[0] == (STD, MEAN)

    def test_images_from_0_to_1_are_not_normalised(self):
        assert scales(Declares(), self.images)[0] == UNSCALED
        assert scales(Declares(), self.images - 0.5)[0] != UNSCALED

    def test_what_was_asked_for_is_taken(self):
        found = true_colours(Declares(), self.images, [(MEAN, STD)], given=([0.5], [0.1] * 3))
        assert found.scale == ([0.5], [0.1] * 3)
