"""The options of callbacks and watches, and what is refused at once."""

import numpy as np
import pytest
import torch

import vitx
from tests.lightning_models import IMAGE
from vitx.callbacks import RolloutCallback

GIVEN = torch.zeros(2, 3, IMAGE, IMAGE)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_images": 0}, "num_images must be a whole number from 1, or two of them, found 0"),
        ({"num_images": (8, 0)}, "num_images must be"),
        ({"num_images": (1, 2, 3)}, "num_images must be"),
        ({"num_images": 8.0}, "num_images must be"),
        ({"methods": ["saliency"]}, "there is no method 'saliency'"),
        ({"methods": {"rollout": {"fusion": "max"}}}, "no option 'fusion'"),
        ({"methods": []}, "methods must be names, or a mapping"),
        ({"target": "best"}, "target must be"),
        ({"weights": "best"}, "weights must be"),
        ({"on_error": "ignore"}, "on_error must be 'warn' or 'raise', found 'ignore'"),
        ({"target": 3.5}, "target must be"),
        ({"methods": "legrad", "target": vitx.targets.token(1, 1)}, "legrad explains only classes"),
        ({"every_n_steps": -3}, "every_n_steps must be a whole number, or None, found -3"),
        ({"class_names": "cat"}, "class_names must be a list of names, or a mapping .*, found 'cat'"),
        ({"bands": 7}, "bands must be one or three channels, in a list, found 7"),
        ({"colormap": 3}, "there is no color map 3"),
        ({"normalization": 0.5}, r"normalization must be \(mean, std\), numbers for the channels, found 0.5"),
        ({"normalization": [0.5]}, "normalization must be"),
        ({"faithfulness": "yes"}, "faithfulness must be True, False or a number of images, found 'yes'"),
        ({"at_start": "no"}, "at_start must be True or False, found 'no'"),
        ({"batch_transform": 3}, "batch_transform must be a function, found 3"),
        ({"dataloader_idx": None}, "dataloader_idx must be the number or the name of a loader, found None"),
        ({"labels": 2.5}, "labels must be an item of a batch, by key or position, found 2.5"),
        ({"boxes": [1]}, "boxes must be a tensor, or an item of a batch"),
        ({"images": GIVEN, "labels": 7}, "labels has no effect on the images given: leave it out, or give a"),
        ({"images": GIVEN, "show": "zz"}, "show has no effect"),
        ({"images": ["cat.jpg"], "boxes": "b"}, "boxes has no effect"),
        ({"images": GIVEN, "per_class": True}, "per_class has no effect"),
        ({"images": [3, 4], "per_class": True}, "per_class has no effect"),
        ({"num_image": 3}, r"RolloutCallback has no option 'num_image': did you mean num_images\?"),
        ({"zzz": 3}, "RolloutCallback has no option 'zzz': vitx.watch.Settings lists them"),
    ],
)
def test_refuses_wrong_arguments_at_once(options, sentence):
    with pytest.raises(vitx.VitxError, match=sentence):
        RolloutCallback(**options)


def test_numbers_of_images_may_come_from_numpy():
    both = RolloutCallback(num_images=np.int64(3)), RolloutCallback(num_images=np.array([3, 5]))
    assert [(one.num_images, one.num_measured) for one in both] == [(3, 3), (3, 5)]


def test_one_number_normalizes_all_channels():
    assert RolloutCallback(normalization=(0.5, 0.25)).normalization == ((0.5,), (0.25,))
