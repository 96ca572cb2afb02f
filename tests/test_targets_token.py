"""One patch as the target: its map shows what it attends to."""

import re

import pytest
import timm
import torch
from torch.nn import functional as F

from tests import models
from tests.by_hand import METHODS, check
from tests.dense_models import made
from tests.modules import Around
from tests.test_full_matrices import mixed, seen_attentions
from vitx import VitxError, explain
from vitx.targets import token

ROWS, COLUMNS = [1, 3], [2, 0]


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=5, img_size=64, num_heads=2).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()


def test_it_is_its_row_of_the_product(vit, images):
    found = explain(vit, images, target=token(ROWS, COLUMNS))
    product = torch.eye(17).double()
    for attention in reversed(seen_attentions(vit, images)[1]):
        product = product @ mixed(attention)
    for image, place in enumerate((1 * 4 + 2, 3 * 4 + 0)):
        assert torch.allclose(found.maps[image].flatten(), product[image, 1 + place, 1:], rtol=0, atol=1e-12)
    assert found.captions == ["patch (1, 2)", "patch (3, 0)"]
    by_pixel = explain(vit, images, target=token(pixel=(47, 31)))
    assert torch.equal(by_pixel.maps[0], found.maps[0])


def test_a_score_is_the_squared_length_of_its_features(vit, images):
    index = 1 + torch.tensor([1 * 4 + 2, 3 * 4 + 0])
    features = torch.nn.Sequential(vit)
    features.forward = vit.forward_features
    check(features, images, token(ROWS, COLUMNS), lambda out: out[range(2), index].pow(2).sum(1), METHODS)


@pytest.mark.parametrize("name", ["clip", "hf dinov2, sdpa", "torchvision", "open_clip", "not square"])
def test_it_looks_at_itself_most(name):
    found = explain(models.built(name), models.FAMILIES[name].images(), target=token(1, 2))
    columns = found.maps.shape[2]
    assert found.maps.flatten(1).argmax(1).tolist() == [columns + 2] * len(found.maps)


def test_a_coarse_token_is_named_in_the_grid_of_the_map():
    found = explain(models.swin(), torch.randn(2, 3, 32, 32), target=token([0, 15], [0, 15]))
    assert found.maps.shape == (2, 16, 16)
    near, far = found.maps[0, :8, :8].sum(), found.maps[1, 8:, 8:].sum()
    assert min(near, far) > 0.5


@pytest.mark.parametrize("name", ["detr", "rt_detr", "mask2former"])
def test_the_queries_of_a_decoder_are_no_patches(name):
    model, images = made(name)
    found = explain(model, images, "evidence" if name == "detr" else "rollout", target=token(pixel=(0, 63)))
    quarters = F.adaptive_avg_pool2d(found.maps[:, None], 2).flatten(1)
    assert quarters.argmax(1).tolist() == [2, 2]


def test_targets_of_each_image_are_split_as_a_loader_splits_the_images(vit, images):
    """This also works for a model whose first output is a loss."""

    pair = Around(lambda vit, x: (x.mean(), vit(x)), vit)
    found = explain(pair, torch.utils.data.DataLoader(images, 1), target=token(ROWS, COLUMNS))
    assert torch.allclose(found.maps, explain(vit, images, target=token(ROWS, COLUMNS)).maps, atol=1e-12)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (lambda: token(), "give one of these"),
        (lambda: token(1), "give one of these"),
        (lambda: token(1, 2, pixel=(3, 4)), "give one of these"),
        (lambda: token([1, 2], [3]), "give rows and as many columns, found 2 and 1"),
        (lambda: token("a", 1), "a row or column of a patch is a number, or one for each image, found 'a'"),
        (lambda: token(pixel="ab"), "give numbers as pixel=(x, y), found 'ab'"),
        (lambda: token(pixel="12"), "give numbers as pixel=(x, y), found '12'"),
        (
            lambda: token(4, 0),
            "there is no patch in row 4, column 0: there are rows 0 to 3 and columns 0 to 3",
        ),
        (
            lambda: token(pixel=(64, 2)),
            "there is no pixel x=64, y=2: there are rows 0 to 63 and columns 0 to 63",
        ),
        (lambda: token([1, 2, 3], [1, 2, 3]), "3 patches for 2 images"),
    ],
)
def test_bad_words(vit, images, target, said):
    with pytest.raises(VitxError, match=re.escape(said)):
        explain(vit, images, target=target())


def test_the_picture_marks_the_patch():
    family = models.FAMILIES["deit"]
    found = explain(models.built("deit"), family.images(), target=token([1, 3], [0, 2]))
    side = family.images().shape[-1] / found.maps.shape[-1]
    corners = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert torch.equal(found.boxes, torch.cat([corners, corners + 1], 1) * side)
