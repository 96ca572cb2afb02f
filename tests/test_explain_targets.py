"""The class or the score that a map explains."""

import numpy as np
import pytest
import timm
import torch

import vitx
from tests import models, oracle
from tests.modules import Around
from tests.oracle import relative_error, same
from vitx import VitxError, explain

METHODS = ["rollout", "grad_rollout"]
IMAGES = models.FAMILIES["deit"].images()


class TestTargets:
    def explained(self, target, images=IMAGES):
        return explain(models.built("deit"), images, "grad_rollout", target=target)

    @pytest.mark.parametrize(
        "target",
        [
            [3, 5],
            (3, 5),
            torch.tensor([3, 5]),
            torch.tensor([3, 5], dtype=torch.int32),
            np.array([3, 5]),
            [np.int64(3), torch.tensor(5)],
        ],
        ids=["list", "tuple", "tensor", "int32 tensor", "numpy", "mixed"],
    )
    def test_one_for_each_image(self, target):
        found = self.explained(target)
        assert found.target.tolist() == [3, 5]
        family = models.FAMILIES["deit"]
        wanted = oracle.oracle_maps(
            models.built("deit", torch.float64),
            IMAGES.double(),
            "grad_rollout",
            [3, 5],
            family.prefix,
            family.readout,
        )
        assert relative_error(found.maps, wanted) < 1e-5

    @pytest.mark.parametrize("target", [4, np.int64(4), torch.tensor(4), np.array(4)])
    def test_one_for_all(self, target):
        found = self.explained(target)
        assert found.target.tolist() == [4, 4]
        assert same(found, self.explained([4, 4]), 1e-7)

    def test_the_predicted_class(self):
        predicted = self.explained(None)
        assert same(predicted, self.explained(predicted.logits.argmax(1)), 1e-7)

    def test_a_function(self):
        found = self.explained(lambda logits: logits[:, 6])
        assert found.target is None
        assert same(found, self.explained(6), 1e-6)

    def test_targets_matter(self):
        assert not same(self.explained(1), self.explained(2), 1e-2)

    @pytest.mark.parametrize("name", ["deit", "siglip", "beit", "hf dinov2, sdpa", "torchvision"])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_batch_equals_one_by_one(self, name, method):
        model, images = models.built(name), models.FAMILIES[name].images(4)
        targets = [6, 0, 3, 3]
        batch = explain(model, images, method, target=targets, discard_ratio=0.5)
        for index, target in enumerate(targets):
            alone = explain(model, images[index : index + 1], method, target=target, discard_ratio=0.5)
            assert relative_error(batch.maps[index : index + 1], alone.maps.double().flatten(1)) < 1e-5

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(
        ("target", "sentence"),
        [
            (7, "target 7 is out of range: the model has classes 0 to 6"),
            (-1, "target -1 is out of range"),
            ([0, 7], "target 7 is out of range"),
            ([1], "names 1 classes for 2 images"),
            ([1, 2, 3], "names 3 classes for 2 images"),
            ([], "target must be"),
            (torch.tensor([[1, 2]]), "target must be"),
            (True, "found True"),
            ([True, False], "target must be"),
            (torch.tensor([True, False]), "target must be"),
            (
                "3",
                r"the number of a class \(only the shell takes names\), .* or one of vitx.targets, found '3'",
            ),
            (["3", "4"], "target must be"),
            (1.0, "found 1.0"),
            ([1.0, 2.0], "target must be"),
            (torch.tensor([1.0, 2.0]), "target must be"),
        ],
    )
    def test_wrong_targets(self, method, target, sentence):
        with pytest.raises(VitxError, match=sentence):
            explain(models.built("deit"), IMAGES, method, target=target)

    @pytest.mark.parametrize(
        ("function", "sentence"),
        [
            (lambda logits: logits, r"must return scores \(2,\), found Tensor \(2, 7\)"),
            (lambda logits: logits.sum(), r"found Tensor \(\)"),
            (lambda logits: logits[:, 0].detach().numpy(), r"scores \(2,\), found ndarray"),
            (lambda logits: logits[:, 0].detach(), "does not depend on the output"),
            (lambda logits: torch.ones(2), "does not depend on the output"),
            (lambda logits: logits[:, 7], r"failed on the output, \(2, 7\): IndexError: index 7 is out"),
        ],
    )
    def test_wrong_functions(self, function, sentence):
        with pytest.raises(VitxError, match=sentence):
            self.explained(function)

    @pytest.mark.parametrize(
        "output",
        [
            lambda features, logits: (features, logits),
            lambda features, logits: (None, logits),
            lambda features, logits: {"tokens": features, "scores": logits},
        ],
    )
    def test_of_several_outputs_the_one_that_was_made_of_the_others(self, output):
        def several(vit, images):
            features = vit.forward_features(images)[:, 0]
            return output(features, vit.head(features))

        for method in METHODS:
            found = explain(Around(several, models.built("deit")), IMAGES, method)
            assert torch.equal(found.maps, explain(models.built("deit"), IMAGES, method).maps)

    def test_several_outputs_none_of_which_was_made_of_the_others(self):
        def heads(vit, images):
            logits = vit(images)
            return {"one": logits[:, :3].exp(), "other": logits[:, 3:].exp()}

        with pytest.raises(VitxError, match=r"2 tensors, one: \(2, 3\), other: \(2, 4\), none of which"):
            explain(Around(heads, models.built("deit")), IMAGES)

    def test_one_logit_is_for_class_1_and_against_class_0(self):
        model = models.deit(num_classes=1).eval()
        found = {target: explain(model, IMAGES, "evidence", target=target) for target in (None, 0, 1)}
        assert torch.allclose(found[0].signed, -found[1].signed, atol=1e-6)
        positive = found[None].logits[:, 0] > 0
        assert torch.equal(found[None].target, positive.long())
        wanted = torch.where(positive[:, None, None], found[1].maps, found[0].maps)
        assert torch.allclose(found[None].maps, wanted, atol=1e-6)
        with pytest.raises(VitxError, match="target 2 is out of range: the model has classes 0 to 1"):
            explain(model, IMAGES, "evidence", target=2)

    def test_an_output_without_classes_needs_a_function(self):
        regressor = Around(lambda vit, images: vit(images)[:, 0], models.built("deit"))
        deeper = Around(lambda vit, images: vit(images)[:, None], models.built("deit"))
        with pytest.raises(VitxError, match=r"is \(2, 1, 7\): use vitx.targets.query"):
            explain(deeper, IMAGES, "grad_rollout")
        found = explain(regressor, IMAGES, "grad_rollout", target=lambda output: output)
        assert same(found, self.explained(0), 1e-6)
        signs = explain(regressor, IMAGES, "evidence")
        assert torch.equal(signs.target, (signs.logits > 0).long())
        assert tuple(explain(regressor, IMAGES, "rollout").maps.shape) == (2, 4, 4)


def ended(model, last):
    """Return the model with a function after its logits."""
    return Around(lambda model, x: last(model(x)), model)


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence", "gae"])
@pytest.mark.parametrize(
    ("classes", "last"),
    [
        (5, lambda z: z.softmax(-1)),
        (5, lambda z: z.sigmoid()),
        (1, lambda z: z.sigmoid()),
        (1, lambda z: z.sigmoid()[:, 0]),
        (1, lambda z: z.sigmoid().squeeze(1)),
    ],
)
def test_a_model_that_ends_in_probabilities_is_explained_at_its_logits(classes, last, method):
    """Thus the predicted class is the one above one half, and the map has its sign."""
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=classes).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected, found = vitx.explain(model, images, method), vitx.explain(ended(model, last), images, method)
    assert torch.allclose(found.maps, expected.maps, atol=1e-9)
    assert found.target is None or torch.equal(found.target, expected.target)
    shift = expected.logits - found.logits.view(expected.logits.shape)
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-9), "a softmax leaves a constant open"
    assert classes > 1 or torch.allclose(shift, torch.zeros_like(shift), atol=1e-9)


def test_a_target_function_is_given_what_the_model_puts_out():
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3).eval()
    found = vitx.explain(
        ended(model, lambda z: z.softmax(-1)), torch.randn(2, 3, 32, 32), target=lambda p: p[:, 0]
    )
    assert torch.allclose(found.logits.sum(1), torch.ones(2))


def test_an_output_in_another_precision():
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    for method in ("rollout", "grad_rollout", "evidence"):
        found = vitx.explain(ended(model, torch.Tensor.double), images, method)
        assert torch.allclose(found.maps.float(), vitx.explain(model, images, method).maps, atol=1e-6)
