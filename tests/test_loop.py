"""What a plain loop passes to the model, compared with what its loader holds."""

import copy

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from vitx import Watch
from vitx.watch.watch import FirstCall, differs

IMAGES = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model():
    return timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (IMAGES, None),
        (IMAGES * 0.9 + 0.05, None),
        (
            (IMAGES - 0.5) / 0.25,
            "your loop gave the model images from -2 to 2, but the loader has images from",
        ),
        (IMAGES * 255, " to 255, but the loader has images from "),
        (IMAGES[..., :24, :24], "3 x 24 x 24, but the loader has images 3 x 32 x 32: give batch_transform"),
    ],
)
def test_how_images_differ(given, said):
    found = differs(given, IMAGES)
    assert found is None if said is None else said in found


def test_sees_the_first_call_and_leaves_the_model_alone():
    net = model()
    first = FirstCall(net)
    first.paused = True
    net(IMAGES)
    assert first.images is None
    first.paused = False
    net(IMAGES[:2])
    assert torch.equal(first.images, IMAGES[:2])
    assert not net._forward_pre_hooks
    net(IMAGES)
    assert len(first.images) == 2


def test_a_copy_of_the_model_sees_nothing():
    net = model()
    first = FirstCall(net)
    copy.deepcopy(net)(IMAGES)
    assert first.images is None
    net(IMAGES[:1])
    assert len(first.images) == 1


def test_a_loop_that_normalizes_is_told(tmp_path):
    net = model()
    watch = Watch(net, DataLoader(TensorDataset(IMAGES, torch.arange(6) % 2), 6), tmp_path)
    watch(0)
    net((IMAGES - 0.5) / 0.25)
    with pytest.warns(UserWarning, match="your loop gave the model images .*: give batch_transform"):
        watch(1)
    assert not net._forward_pre_hooks
