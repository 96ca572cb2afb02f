"""A part of a dense output as the target."""

import re

import pytest
import timm
import torch

from tests.by_hand import check
from tests.dense_models import SEGMENTERS, made
from vitx import VitxError, Watch, explain
from vitx.targets import region


@pytest.fixture(scope="module")
def segformer():
    return made("segformer")[0]


EVERY_OTHER = torch.arange(32) // 4 % 2 * torch.ones(32, 1)
PARTS = {
    "box": ({"box": (8, 16, 24, 32)}, lambda out: out.logits[:, 3, 4:8, 2:6].sum((1, 2))),
    "half a cell": (
        {"box": (8, 16, 18, 32)},
        lambda out: (out.logits[:, 3, 4:8, 2:5] * torch.tensor([1, 1, 0.5])).sum((1, 2)),
    ),
    "point": ({"point": (13, 31)}, lambda out: out.logits[:, 3, 7, 3]),
    "mask": ({"mask": EVERY_OTHER}, lambda out: out.logits[:, 3, :, 1::2].sum((1, 2))),
}


@pytest.mark.parametrize(("part", "score"), PARTS.values(), ids=PARTS)
def test_it_is_the_score_by_hand(segformer, part, score):
    found = check(segformer, torch.rand(2, 3, 32, 32), region(3, **part), score, ("rollout", "evidence"))
    assert found["rollout"].logits.shape == (2, 5, 8, 8)
    assert found["rollout"].captions[0].startswith("class 3: ")
    assert found["rollout"].boxes.shape == (2, 4)


def semantic(output):
    """Return the scores of classes, (B, C, h, w): the logits, or those computed from mask queries."""
    if "logits" in output:
        return output.logits
    classes, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_of_all_kinds(name):
    """They include mask queries, whose masks are products of queries and pixels."""
    model, images = made(name)
    size = images.shape[-1]

    def score(output):
        found = semantic(output)
        side = found.shape[-1] // 4
        return found[:, 3, side : 2 * side, 2 * side :].sum((1, 2))

    target = region(3, box=(size // 2, size // 4, size, size // 2))
    check(model, images, target, score, ("rollout", "evidence"))


def test_tokens_lie_as_the_picture_does():
    """Tokens before the patches are not part of the picture."""
    model = timm.create_model(
        "test_vit", num_classes=5, class_token=True, global_pool="", img_size=(32, 64)
    ).eval()
    images = torch.rand(2, 3, 32, 64)

    check(model, images, region(3, point=(40, 20)), lambda out: out[:, 1 + 4 + 2, 3], ("rollout",))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({}, "give one"),
        ({"box": (0, 0, 3)}, "box=(x0, y0, x1, y1)"),
        ({"box": (0, 0, 33, 8)}, "not inside images of 32 x 32 pixels"),
        ({"point": (32, 0)}, "not inside"),
        ({"mask": torch.ones(3, 3)}, "a mask must be (H, W)"),
        ({"mask": torch.zeros(32, 32)}, "empty"),
        ({"mask": [["a"]]}, "a mask is made of numbers, (H, W) or (B, H, W), found [['a']]"),
        ({"cls": 5, "point": (0, 0)}, "classes 0 to 4"),
    ],
)
def test_bad_words(segformer, part, said):
    with pytest.raises(VitxError, match=re.escape(said)):
        explain(segformer, torch.rand(1, 3, 32, 32), target=region(**({"cls": 3} | part)))


def test_an_output_without_places_says_what_fits():
    model = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    with pytest.raises(
        VitxError, match=re.escape("the output is (1, 5): ask about a class, since it has no spatial")
    ):
        explain(model, torch.rand(1, 3, 32, 32), target=region(3, point=(0, 0)))


def test_tokens_without_the_proportions_of_the_picture_say_so():
    options = {"class_token": False, "global_pool": "", "img_size": 112, "patch_size": (8, 16)}
    model = timm.create_model("test_vit", num_classes=5, **options).eval()
    said = "the output is (1, 98, 5), (B, tokens, classes), but 98 tokens form no grid over 112 x 112 pixels"
    with pytest.raises(VitxError, match=f"^{re.escape(said)}$"):
        explain(model, torch.rand(1, 3, 112, 112), target=region(3, point=(0, 0)))


def test_tokens_in_another_grid_than_that_of_the_map_are_refused():
    """64 tokens of a square picture need not be 8 x 8."""
    options = {"class_token": False, "global_pool": "", "img_size": 32, "patch_size": (2, 8)}
    model = timm.create_model("test_vit", num_classes=5, **options).eval()
    said = "the map has a grid of (16, 4), but the tokens of the output seemed to have one of (8, 8): give a"
    with pytest.raises(VitxError, match=re.escape(said)):
        explain(model, torch.rand(1, 3, 32, 32), target=region(3, point=(0, 0)))


def test_mask_queries_may_have_other_proportions_than_the_map():
    """Their masks tell where they lie; only of tokens it is taken from their number."""

    class MaskQueries(torch.nn.Module):
        def __init__(self):
            super().__init__()
            options = {"class_token": False, "global_pool": "", "img_size": 32, "patch_size": 8}
            self.tokens = timm.create_model("test_vit", num_classes=9, **options)

        def forward(self, images):
            out = self.tokens(images)
            masks = out[..., 6:].mT.unflatten(2, (2, 8))
            return {"class_queries_logits": out[:, :3, :6], "masks_queries_logits": masks}

    found = explain(MaskQueries().eval(), torch.rand(1, 3, 32, 32), target=region(3, point=(0, 0)))
    assert found.maps.shape == (1, 4, 4)


def test_a_training_shows_a_region(segformer, tmp_path):
    target = region(3, box=(0, 0, 16, 32))
    watch = Watch(
        segformer, torch.rand(2, 3, 32, 32), tmp_path, target=target, methods=["evidence"], on_error="raise"
    )
    assert "vitx/evidence/entropy" in watch(1)
