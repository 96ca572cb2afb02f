"""Models, images and options that cannot be explained are refused in one sentence."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests import models
from tests.modules import Around
from vitx import VitxError, explain
from vitx.targets import Asked, Question
from vitx.targets.question import Answers

METHODS = ["rollout", "grad_rollout"]
IMAGES = models.FAMILIES["deit"].images()


def patch_dropping():
    """Return a model that drops half of the patches, even in eval mode."""

    model = models.deit()
    model.norm_pre = Around(lambda tokens: tokens[:, : len(tokens[0]) // 2])
    return model


class TestRefusals:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", models.REFUSED)
    def test_models(self, name, method):
        refused = models.REFUSED[name]
        with pytest.raises(VitxError, match=refused.sentence):
            explain(refused.build(), torch.randn(2, 3, refused.image_size, refused.image_size), method)

    @pytest.mark.parametrize("name", models.NOT_PLAIN)
    def test_models_that_are_not_plain(self, name):
        refused = models.NOT_PLAIN[name]
        with pytest.raises(VitxError, match=refused.sentence):
            explain(refused.build(), torch.randn(2, 3, refused.image_size, refused.image_size), "flow")

    def test_evidence_of_a_model_without_residuals(self):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
                self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

            def forward(self, images):
                tokens = self.embed(images).flatten(2).mT
                return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

        model = Plain().eval()
        assert explain(model, IMAGES).conservation.allclose(torch.ones(2))
        with pytest.raises(VitxError, match="no attention inside a residual was found"):
            explain(model, IMAGES, "evidence")

    @pytest.mark.parametrize("method", ["rollout", "attention"])
    def test_a_model_that_drops_patches(self, method):
        found = explain(patch_dropping(), IMAGES, method)
        assert (found.maps.flatten(1)[:, 7:] == 0).all(), "7 patches are left"
        assert (found.maps.flatten(1)[:, :7] > 0).all()

    def test_each_model_that_is_refused_says_one_sentence(self):
        with pytest.raises(VitxError) as error:
            explain(models.swin(), torch.randn(2, 3, 32, 32), "flow")
        assert "\n" not in str(error.value)
        assert isinstance(error.value, ValueError)

    @pytest.mark.parametrize(
        ("images", "sentence"),
        [
            (IMAGES[0], r"shape \(3, 32, 32\): .*: add a batch dimension"),
            (IMAGES.movedim(1, 3), r"[^.]: put the channels first with images.permute\(0, 3, 1, 2\)$"),
            (IMAGES[None], r"the model refused images of shape \(1, 2, 3, 32, 32\)"),
            (IMAGES[None, None], r"found \(1, 1, 2, 3, 32, 32\)"),
            (IMAGES[:0], r"found \(0, 3, 32, 32\)"),
            (IMAGES.long(), "found torch.int64"),
            (IMAGES.double(), "images are torch.float64 and the model is torch.float32"),
            (IMAGES.numpy(), "found ndarray"),
            ([IMAGES[0]], "found list"),
            (IMAGES.to("meta"), "images are on meta and the model is on cpu"),
        ],
        ids=[
            "rank 3",
            "channels last",
            "rank 5",
            "rank 6",
            "empty",
            "int",
            "double",
            "numpy",
            "list",
            "device",
        ],
    )
    @pytest.mark.parametrize("method", METHODS)
    def test_images(self, images, sentence, method):
        with pytest.raises(VitxError, match=sentence):
            explain(models.built("deit"), images, method)

    @pytest.mark.parametrize("name", ["deit", "hf vit, sdpa", "torchvision", "open_clip"])
    @pytest.mark.parametrize("shape", [(2, 3, 40, 40), (2, 1, 32, 32)], ids=["size", "channels"])
    def test_images_that_the_model_refuses(self, name, shape):
        with pytest.raises(VitxError, match=rf"refused images of shape \({shape[0]}, {shape[1]}, {shape[2]}"):
            explain(models.built(name), torch.randn(shape))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_images_that_are_not_finite(self, method, value):
        images = IMAGES.clone()
        images[1, 0, 0, 0] = value
        with pytest.raises(VitxError, match=rf"{method} maps of images \[1\] are not finite"):
            explain(models.built("deit"), images, method)

    @pytest.mark.parametrize("images", [IMAGES, "cat.jpg"])
    def test_model_is_no_module(self, images):
        with pytest.raises(VitxError, match="found function"):
            explain(lambda images: images, images)

    def test_model_returns_no_logits(self):
        def silent(vit, images):
            vit(images)

        with pytest.raises(VitxError, match="must return logits, found NoneType"):
            explain(Around(silent, models.built("deit")), IMAGES)

    @pytest.mark.parametrize("method", ["gradcam", "", None, 3])
    def test_unknown_method(self, method):
        with pytest.raises(VitxError, match=r"there is no method .*: the methods are rollout, grad_rollout"):
            explain(models.built("deit"), IMAGES, method)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"discard": 0.5}, "has no option 'discard': its options are head_fusion, discard_ratio, start"),
            ({"head_fusion": "median"}, "head_fusion must be one of mean, max, min, found 'median'"),
            ({"discard_ratio": 1.0}, "discard_ratio must be at least 0 and below 1, found 1.0"),
            ({"discard_ratio": -0.5}, "found -0.5"),
            ({"discard_ratio": "a"}, "found 'a'"),
            ({"start_layer": 3}, "start_layer must be from 0 to 2, as the model has 3 layers, found 3"),
            ({"start_layer": -1}, "found -1"),
            ({"start_layer": 1.0}, "start_layer must be a whole number, found 1.0"),
            ({"start_layer": True}, "found True"),
        ],
    )
    def test_options(self, method, options, sentence):
        with pytest.raises(VitxError, match=sentence):
            explain(models.built("deit"), IMAGES, method, **options)

    def test_parameters_of_the_method_are_no_options(self):
        with pytest.raises(VitxError, match="has no option 'evidence'"):
            explain(models.built("deit"), IMAGES, evidence=None)


class Own(Question):
    """A user-defined question."""

    def __init__(self, answers, cells=None):
        self.answers, self.cells = answers, cells

    def put(self, model, images):
        return Asked(images, lambda _: self.answers, cells=self.cells)


@pytest.mark.parametrize("method", [*METHODS, "evidence"])
@pytest.mark.parametrize(
    ("question", "given"),
    [
        (Own(Answers(captions=["one", "two"])), "neither"),
        (Own(Answers(scores=IMAGES.sum((1, 2, 3))), lambda grid: [(0, 0)] * 2), "both"),
    ],
)
def test_a_question_asks_for_scores_or_for_patches(question, given, method):
    said = rf"a score for each image, by Answers\(scores\), or a patch of each, .*: found {given}"
    with pytest.raises(VitxError, match=said):
        explain(models.built("deit"), IMAGES, method, target=question)


def test_answers_of_another_kind_are_refused():
    with pytest.raises(VitxError, match=r"must be vitx\.targets\.Answers, found Tensor"):
        explain(models.built("deit"), IMAGES, target=Own(torch.zeros(2)))


def test_a_loader_with_images_of_several_sizes_is_refused_at_the_first_other_one():
    sizes = iter([32, 32, 48])
    loader = DataLoader(range(9), 1, collate_fn=lambda _: torch.randn(1, 3, *[next(sizes)] * 2))
    said = r"images in batch 3 of the DataLoader are \(3, 48, 48\), but before \(3, 32, 32\)"
    with pytest.raises(VitxError, match=said):  # not StopIteration: nothing more is read
        explain(models.built("deit"), loader)
