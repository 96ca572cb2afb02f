"""From a model and images to maps: parity with the oracle, and the fields of an explanation."""

import pytest
import torch

import vitx
from tests import models, oracle
from tests.oracle import same
from vitx import explain
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
