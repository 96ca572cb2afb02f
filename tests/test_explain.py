"""From a model and images to maps: parity with the oracle, fields of an explanation, targets."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitx
from tests import models, oracle
from tests.oracle import relative_error, same
from vitx import VitxError, explain
from vitx.functional import tiles
from vitx.tape import kernels

FAMILIES = sorted(models.FAMILIES)
METHODS = ["rollout", "grad_rollout"]
IMAGES = models.FAMILIES["deit"].images()


_SEEN = {}


def observed(name, network="linearised"):
    """Return what the oracle observes in the family's float64 model."""
    if (name, network) not in _SEEN:
        model, family = models.built(name, torch.float64), models.FAMILIES[name]
        images = family.images(dtype=torch.float64)
        _SEEN[name, network] = oracle.observe(model, images, family.target, network)
    return _SEEN[name, network]


def check_parity(name, methods, fusion, discard, start_layer):
    """Compare the maps of methods that share a pass with those of the oracle."""
    family, seen = models.FAMILIES[name], observed(name)
    setting = fusion, discard, start_layer
    wanted = {
        method: oracle.maps_of(seen, method, family.prefix, family.readout, *setting) for method in methods
    }
    options = {"head_fusion": fusion, "discard_ratio": discard, "start_layer": start_layer}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9 if family.exact else 3e-6)):
        given = models.built(name, dtype), family.images(dtype=dtype)
        asked = dict.fromkeys(methods, options)
        for method, found in vitx.explain_methods(*given, asked, target=family.target).items():
            assert found.maps.dtype == found.logits.dtype == dtype
            assert tuple(found.maps.shape) == (2, *family.grid)
            assert torch.allclose(found.logits.double(), seen.logits, atol=1e-4)
            # The values of a map are shares of 1, so float32 leaves an absolute error of 1e-7 as well.
            absolute = 2e-7 if dtype == torch.float32 else 0
            error = (found.maps.double().flatten(1) - wanted[method]).abs().amax(1)
            assert (error <= tolerance * wanted[method].amax(1) + absolute).all(), method


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("methods", [["rollout"], ["grad_rollout"]], ids=str)
def test_every_family_equals_the_oracle(name, methods):
    check_parity(name, methods, "mean", 0.0, 0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("fusion", "discard", "start_layer"),
    [("max", 0.9, 0), ("min", 0.3, 1), ("mean", 0.3, 2), ("max", 0.0, 1)],
)
def test_every_family_equals_the_oracle_with_options(name, fusion, discard, start_layer):
    check_parity(name, METHODS, fusion, discard, start_layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_the_papers(name):
    family, seen = models.FAMILIES[name], observed(name, "plain")
    wanted = {
        "grad_rollout": oracle.maps_of(seen, "grad_rollout", family.prefix, family.readout),
        "gae": oracle.gae_maps(seen, family.prefix, family.readout),
    }
    for method, maps in wanted.items():
        found = explain(
            models.built(name, torch.float64),
            family.images(dtype=torch.float64),
            method,
            target=family.target,
            gradient="plain",
        )
        assert oracle.relative_error(found.maps, maps) < (1e-9 if family.exact else 3e-6)


@pytest.mark.parametrize("start_layer", [0, 1, 2])
@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "tile"), [("deit", "all"), ("siglip", "all"), ("deit", "some rows")])
def test_every_option_equals_the_oracle(monkeypatch, name, method, fusion, discard, start_layer, tile):
    if tile == "some rows":  # as for large images, whose A is recomputed
        monkeypatch.setattr(tiles, "_room", lambda device: 3 * 17 * 5)
        monkeypatch.setattr(tiles, "_FEWEST_ROWS", 5)
        monkeypatch.setattr(kernels, "SMALL", 0)
    check_parity(name, [method], fusion, discard, start_layer)


def test_maps_are_not_negative_and_not_constant():
    for method in METHODS:
        maps = explain(models.built("deit"), IMAGES, method).maps
        assert (maps >= 0).all()
        assert (maps.flatten(1).std(1) > 1e-3).all()


class TestExplanation:
    def test_fields(self):
        family = models.FAMILIES["not square"]
        found = explain(models.built("not square"), family.images(3), "grad_rollout")
        assert tuple(found.maps.shape) == (3, 3, 5)
        assert tuple(found.logits.shape) == (3, models.CLASSES)
        assert found.image_size == (24, 40)
        assert found.target.dtype == torch.long
        assert found.target.tolist() == found.logits.argmax(1).tolist()
        assert not found.maps.requires_grad
        assert not found.logits.requires_grad
        assert not found.maps.is_inference()

    def test_logits_are_the_models(self):
        model = models.built("deit")
        with torch.no_grad():
            wanted = model(IMAGES)
        assert torch.equal(explain(model, IMAGES, "grad_rollout").logits, wanted)
        assert torch.allclose(explain(model, IMAGES, "rollout").logits, wanted, rtol=1e-6, atol=1e-6)

    def test_methods_without_a_class_have_no_target(self):
        assert explain(models.built("deit"), IMAGES, "rollout", target=3).target is None

    def test_images_are_not_changed(self):
        images = IMAGES.clone().requires_grad_()
        explain(models.built("deit"), images, "grad_rollout")
        assert torch.equal(images, IMAGES)
        assert images.grad is None

    def test_a_training_model_is_explained_in_eval_mode(self):
        model = models.deit(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).train()
        assert same(
            explain(model, IMAGES, "grad_rollout"), explain(models.built("deit"), IMAGES, "grad_rollout")
        )

    def test_several_methods_share_a_pass(self):
        model = models.built("deit")
        both = vitx.explain_methods(
            model, IMAGES, {"rollout": {"discard_ratio": 0.5}, "grad_rollout": {}}, target=2
        )
        assert list(both) == METHODS
        assert same(both["rollout"], explain(model, IMAGES, discard_ratio=0.5), 1e-6)
        assert same(both["grad_rollout"], explain(model, IMAGES, "grad_rollout", target=2), 1e-6)
        assert both["rollout"].target is None
        assert both["grad_rollout"].target.tolist() == [2, 2]

    def test_one_forward_pass(self):
        model = models.deit().eval()
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        explain(model, models.FAMILIES["deit"].images(5), "grad_rollout", target=[0, 1, 2, 3, 4])
        assert calls == [1]


class Around(nn.Module):
    """A wrapper that calls the model in its own way."""

    def __init__(self, call):
        super().__init__()
        self.vit, self.call = models.built("deit"), call

    def forward(self, images):
        return self.call(self.vit, images)


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
            found = explain(Around(several), IMAGES, method)
            assert torch.equal(found.maps, explain(models.built("deit"), IMAGES, method).maps)

    def test_several_outputs_none_of_which_was_made_of_the_others(self):
        def heads(vit, images):
            logits = vit(images)
            return {"one": logits[:, :3].exp(), "other": logits[:, 3:].exp()}

        with pytest.raises(VitxError, match=r"2 tensors, one: \(2, 3\), other: \(2, 4\), none of which"):
            explain(Around(heads), IMAGES)

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
        regressor = Around(lambda vit, images: vit(images)[:, 0])
        deeper = Around(lambda vit, images: vit(images)[:, None])
        with pytest.raises(VitxError, match=r"is \(2, 1, 7\): use vitx.targets.query"):
            explain(deeper, IMAGES, "grad_rollout")
        found = explain(regressor, IMAGES, "grad_rollout", target=lambda output: output)
        assert same(found, self.explained(0), 1e-6)
        signs = explain(regressor, IMAGES, "evidence")
        assert torch.equal(signs.target, (signs.logits > 0).long())
        assert tuple(explain(regressor, IMAGES, "rollout").maps.shape) == (2, 4, 4)


class Ended(nn.Module):
    """A model with a function after its logits."""

    def __init__(self, model, last):
        super().__init__()
        self.model, self.last = model, last

    def forward(self, images):
        return self.last(self.model(images))


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
    expected, found = vitx.explain(model, images, method), vitx.explain(Ended(model, last), images, method)
    assert torch.allclose(found.maps, expected.maps, atol=1e-9)
    assert found.target is None or torch.equal(found.target, expected.target)
    shift = expected.logits - found.logits.view(expected.logits.shape)
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-9), "a softmax leaves a constant open"
    assert classes > 1 or torch.allclose(shift, torch.zeros_like(shift), atol=1e-9)


def test_a_target_function_is_given_what_the_model_puts_out():
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3).eval()
    found = vitx.explain(
        Ended(model, lambda z: z.softmax(-1)), torch.randn(2, 3, 32, 32), target=lambda p: p[:, 0]
    )
    assert torch.allclose(found.logits.sum(1), torch.ones(2))


def test_an_output_in_another_precision():
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    for method in ("rollout", "grad_rollout", "evidence"):
        found = vitx.explain(Ended(model, torch.Tensor.double), images, method)
        assert torch.allclose(found.maps.float(), vitx.explain(model, images, method).maps, atol=1e-6)
