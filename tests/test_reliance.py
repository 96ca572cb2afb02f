"""Reliance: a model that reads one patch alone changes its prediction with that patch, and no other."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from vitx import VitxError
from vitx.evaluation.faithfulness import of_another_class
from vitx.metrics import reliance


class Corner(nn.Module):
    """A model that predicts the class which the patch in the upper left corner holds."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        found = images[:, 0, :4, :4].mean((1, 2)).round().long()
        return found.float() - 0.5 if self.classes == 1 else one_hot(found, self.classes).float()


def marked(*classes):
    images = torch.zeros(len(classes), 1, 32, 32)
    images[:, 0, :4, :4] = torch.tensor(classes)[:, None, None].float()
    return images


def at(place, count):
    return one_hot(torch.tensor(place), 64).float().view(1, 8, 8).expand(count, 8, 8)


@pytest.mark.parametrize(("classes", "shown"), [(3, (0, 1, 2, 2, 1)), (1, (0, 1, 1, 0, 1))])
def test_a_shortcut_is_relied_on_and_another_place_is_not(classes, shown):
    images = marked(*shown)
    found = reliance(Corner(classes), images, {"mark": at(0, 5), "off": at(63, 5)}, batch_size=2)
    by_chance = reliance(Corner(classes), images, {"all": torch.ones(5, 8, 8)}, share=1)["all"]
    assert found["mark"].tolist() == [1] * 5
    assert found["off"].abs().sum() == by_chance.abs().sum() == 0


def test_fewer_patches_than_the_share_are_one():
    assert reliance(Corner(), marked(0, 1), {"mark": at(0, 2)}, share=1e-6)["mark"].tolist() == [1, 1]


def test_images_of_one_class_fill_each_other_or_are_given():
    images, maps = marked(1, 1), {"mark": at(0, 2)}
    assert of_another_class(torch.eye(2)[[1, 1]]).tolist() == [1, 0]
    assert reliance(Corner(), images, maps)["mark"].tolist() == [0, 0]
    assert reliance(Corner(), images, maps, others=marked(2, 2))["mark"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        (marked(1), {}, "two or more"),
        (marked(1, 2), {"share": 0}, "above 0 and at most 1, found 0"),
        (marked(1, 2), {"others": torch.zeros(7)}, "broadcasts"),
    ],
)
def test_wrong_arguments_are_said(images, options, said):
    with pytest.raises(VitxError, match=said):
        reliance(Corner(), images, {"mark": at(0, len(images))}, **options)
