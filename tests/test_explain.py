"""From a model and images to maps: parity with the oracle, targets, settings, refusals."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vitx
from tests import models, oracle
from vitx import VitxError, attention, explain

FAMILIES = sorted(models.FAMILIES)
METHODS = ["rollout", "grad_rollout"]
IMAGES = models.FAMILIES["deit"].images()


def relative_error(maps, wanted):
    """Against each map's own maximum."""
    maps = maps.double().flatten(1)
    return ((maps - wanted).abs().amax(1) / wanted.amax(1)).max().item()


def same(first, second, tolerance=1e-5):
    return relative_error(first.maps, second.maps.double().flatten(1)) < tolerance


_SEEN = {}


def observed(name):
    """What the oracle sees in the family's float64 model."""
    if name not in _SEEN:
        images = models.FAMILIES[name].images(dtype=torch.float64)
        _SEEN[name] = oracle.observe(models.built(name, torch.float64), images, target_of(name))
    return _SEEN[name]


def target_of(name):
    return None if models.FAMILIES[name].classes else lambda output: output[:, 2]


def check_parity(name, method, fusion, discard, start_layer):
    family = models.FAMILIES[name]
    wanted = oracle.maps_of(
        observed(name), method, family.prefix, family.readout, fusion, discard, start_layer
    )
    options = {"head_fusion": fusion, "discard_ratio": discard, "start_layer": start_layer}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9 if family.exact else 1e-6)):
        found = explain(
            models.built(name, dtype), family.images(dtype=dtype), method, target=target_of(name), **options
        )
        assert found.maps.dtype == found.logits.dtype == dtype
        assert tuple(found.maps.shape) == (2, *family.grid)
        assert torch.allclose(found.logits.double(), observed(name).logits, atol=1e-4)
        # A map is a share of a whole of 1, so float32 leaves an absolute error of 1e-7 as well.
        absolute = 2e-7 if dtype == torch.float32 else 0
        error = (found.maps.double().flatten(1) - wanted).abs().amax(1)
        assert (error <= tolerance * wanted.amax(1) + absolute).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fusion", "discard", "start_layer"),
    [("mean", 0.0, 0), ("max", 0.9, 0), ("min", 0.3, 1), ("mean", 0.3, 2), ("max", 0.0, 1)],
)
def test_every_family_equals_the_oracle(name, method, fusion, discard, start_layer):
    check_parity(name, method, fusion, discard, start_layer)


@pytest.mark.parametrize("start_layer", [0, 1, 2])
@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "tile"), [("deit", "all"), ("siglip", "all"), ("deit", "some rows")])
def test_every_option_equals_the_oracle(monkeypatch, name, method, fusion, discard, start_layer, tile):
    if tile == "some rows":  # as for large images, whose A is computed anew
        monkeypatch.setitem(attention._TILE, "cpu", 3 * 17 * 5)
        monkeypatch.setattr(attention, "_FEWEST_ROWS", 5)
    check_parity(name, method, fusion, discard, start_layer)


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
            ([], "names 0 classes for 2 images"),
            (torch.tensor([[1, 2]]), "target must be"),
            (True, "found True"),
            ([True, False], "target must be"),
            (torch.tensor([True, False]), "target must be"),
            ("3", "found '3'"),
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
            (lambda logits: logits, r"of shape \(2,\), found \(2, 7\)"),
            (lambda logits: logits.sum(), r"found \(\)"),
            (lambda logits: logits[:, 0].tolist(), "found list"),
            (lambda logits: logits[:, 0].detach(), "does not depend on any attention"),
            (lambda logits: torch.ones(2), "does not depend on any attention"),
        ],
    )
    def test_wrong_functions(self, function, sentence):
        with pytest.raises(VitxError, match=sentence):
            self.explained(function)

    def test_an_output_without_classes_needs_a_function(self):
        class Regressor(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = models.built("deit")

            def forward(self, images):
                return self.vit(images)[:, 0]

        with pytest.raises(VitxError, match=r"shape \(2,\), not \(B, classes\)"):
            explain(Regressor(), IMAGES, "grad_rollout")
        found = explain(Regressor(), IMAGES, "grad_rollout", target=lambda output: output)
        assert same(found, self.explained(0), 1e-6)
        assert tuple(explain(Regressor(), IMAGES, "rollout").maps.shape) == (2, 4, 4)


def reference(method):
    return explain(models.built("deit"), IMAGES, method, target=2)


@pytest.mark.parametrize("method", METHODS)
class TestSettings:
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_under_gradient_modes(self, method, context):
        with context():
            images = IMAGES.clone()
            found = explain(models.built("deit"), images, method, target=2)
            assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
            assert torch.is_grad_enabled() == (context is torch.enable_grad)
        assert not found.maps.is_inference()
        assert same(found, reference(method), 1e-7)

    def test_a_model_made_in_inference_mode(self, method):
        """Its weights are inference tensors, which autograd refuses to save."""
        with torch.inference_mode():
            model = models.deit().eval()
        if method == "grad_rollout":
            with pytest.raises(VitxError, match="inference"):
                explain(model, IMAGES, method, target=2)
        else:
            assert same(explain(model, IMAGES, method), reference(method), 1e-6)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    def test_under_autocast(self, method, name):
        model, images = models.built(name), models.FAMILIES[name].images()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = explain(model, images, method, target=2)
            assert torch.is_autocast_enabled("cpu")
        assert found.maps.dtype == torch.float32
        assert same(found, explain(model, images, method, target=2), 0.2)

    def test_the_maths_is_not_autocast(self, method):
        class Precise(nn.Module):
            """A model that leaves autocast, so that only vitx's own products could run in bf16."""

            def __init__(self):
                super().__init__()
                self.vit = models.built("deit")

            def forward(self, images):
                with torch.autocast("cpu", enabled=False):
                    return self.vit(images)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = explain(Precise(), IMAGES, method, target=2)
        assert same(found, reference(method), 1e-6)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    def test_bf16_model(self, method, name):
        model, images = models.FAMILIES[name].build().bfloat16(), models.FAMILIES[name].images()
        found = explain(model, images.bfloat16(), method, target=2)
        assert found.maps.dtype == found.logits.dtype == torch.float32
        assert same(found, explain(models.built(name), images, method, target=2), 0.2)

    @pytest.mark.parametrize("name", ["deit", "deit without fused attention", "torchvision", "hf vit, eager"])
    @pytest.mark.parametrize("head_too", [False, True])
    def test_frozen(self, method, name, head_too):
        model = models.FAMILIES[name].build().requires_grad_(False)
        if not head_too:
            list(model.children())[-1].requires_grad_(True)
        images = models.FAMILIES[name].images()
        found = explain(model, images, method, target=2)
        # Without gradients PyTorch may take another kernel, which rounds differently.
        assert same(found, explain(models.built(name), images, method, target=2), 1e-5)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_activation_checkpointing(self, method, frozen):
        model = models.checkpointed(models.deit()).train()
        model.requires_grad_(not frozen)
        assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-5)

    def test_partly_frozen_activation_checkpointing(self, method):
        """The first blocks need no gradient, the others do."""
        model = models.checkpointed(models.deit())
        model.requires_grad_(False)
        model.blocks[2].requires_grad_(True)
        assert same(explain(model, IMAGES, method, target=2), reference(method), 1e-5)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_reentrant_checkpointing_is_right_or_refused(self, method, frozen):
        class Checkpointed(nn.Module):
            def __init__(self, block):
                super().__init__()
                self.block = block

            def forward(self, tokens):
                return checkpoint(self.block, tokens, use_reentrant=True)

        model = models.deit().requires_grad_(not frozen)
        model.blocks = nn.Sequential(*[Checkpointed(block) for block in model.blocks])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if method == "grad_rollout":
                with pytest.raises(VitxError, match="reentrant checkpointing"):
                    explain(model, IMAGES, method, target=2)
            else:
                assert same(explain(model, IMAGES, method), reference(method), 1e-6)

    @pytest.mark.parametrize("wrap", ["attribute", "sequential", "data parallel"])
    def test_wrapped(self, method, wrap):
        class Task(nn.Module):
            """As a LightningModule is written."""

            def __init__(self):
                super().__init__()
                self.model = models.built("deit")
                self.loss = nn.CrossEntropyLoss()

            def forward(self, images):
                return self.model(images)

        built = models.built("deit")
        wrapped = {
            "attribute": Task,
            "sequential": lambda: nn.Sequential(nn.Identity(), built),
            "data parallel": lambda: nn.DataParallel(built),
        }[wrap]()
        assert same(explain(wrapped, IMAGES, method, target=2), reference(method), 1e-7)


@pytest.mark.parametrize("run_before", [False, True], ids=["fresh", "already run"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", ["torch.compile", "model.compile"])
def test_compiled(form, backend, run_before):
    torch._dynamo.reset()
    model = models.deit().eval()
    if form == "torch.compile":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    if run_before:
        with torch.no_grad():
            model(IMAGES)
    for method in METHODS:
        assert same(explain(model, IMAGES, method, target=2), reference(method))
    if run_before:
        # It is still compiled: no new graph is made for the same input.
        torch._dynamo.utils.counters.clear()
        with torch.no_grad():
            model(IMAGES)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def patch_dropping():
    """Drops half of the patches in eval mode too."""

    class Half(nn.Module):
        def forward(self, tokens):
            return tokens[:, : len(tokens[0]) // 2]

    model = models.deit()
    model.norm_pre = Half()
    return model


class TestRefusals:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("name", models.REFUSED)
    def test_models(self, name, method):
        refused = models.REFUSED[name]
        with pytest.raises(VitxError, match=refused.sentence):
            explain(refused.build(), torch.randn(2, 3, refused.image_size, refused.image_size), method)

    def test_a_model_that_drops_patches(self):
        with pytest.raises(VitxError, match="8 tokens do not fit a grid of 4 x 4 patches and 1 prefix"):
            explain(patch_dropping(), IMAGES)

    def test_each_model_that_is_refused_says_one_sentence(self):
        with pytest.raises(VitxError) as error:
            explain(models.swin(), torch.randn(2, 3, 32, 32))
        assert "\n" not in str(error.value)
        assert isinstance(error.value, ValueError)

    def test_two_forward_passes(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = models.built("deit")

            def forward(self, images):
                return self.vit(images) + self.vit(images.flip(-1))

        with pytest.raises(VitxError, match="2 forward passes"):
            explain(Twice(), IMAGES)

    def test_crops(self):
        class Crops(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = models.built("deit")

            def forward(self, images):
                return self.vit(torch.cat([images, images.flip(-1)]))[: len(images)]

        with pytest.raises(VitxError, match=r"several crops .*\(4, \d, 17, 17\) for 2 images"):
            explain(Crops(), IMAGES)

    @pytest.mark.parametrize(
        ("images", "sentence"),
        [
            (IMAGES[0], r"found \(3, 32, 32\): add a batch dimension"),
            (IMAGES[None], r"found \(1, 2, 3, 32, 32\)"),
            (IMAGES[:0], r"found \(0, 3, 32, 32\)"),
            (IMAGES.long(), "found torch.int64"),
            (IMAGES.double(), "images are torch.float64 and the model is torch.float32"),
            (IMAGES.numpy(), "found ndarray"),
            ([IMAGES[0]], "found list"),
            (IMAGES.to("meta"), "images are on meta and the model is on cpu"),
        ],
        ids=["rank 3", "rank 5", "empty", "int", "double", "numpy", "list", "device"],
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

    def test_model_is_no_module(self):
        with pytest.raises(VitxError, match="found function"):
            explain(lambda images: images, IMAGES)

    def test_model_returns_no_logits(self):
        class Silent(nn.Module):
            def __init__(self):
                super().__init__()
                self.vit = models.built("deit")

            def forward(self, images):
                self.vit(images)

        with pytest.raises(VitxError, match="must return logits, found NoneType"):
            explain(Silent(), IMAGES)

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


def test_import_is_light():
    """`import vitx` pulls in neither a model library nor Lightning nor matplotlib."""
    code = "import vitx, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    root = Path(vitx.__file__).parents[1]
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    names = set(loaded.stdout.split())
    assert "vitx" in names
    heavy = {
        "lightning",
        "pytorch_lightning",
        "timm",
        "torchvision",
        "transformers",
        "matplotlib",
        "open_clip",
        "scipy",
    }
    assert not names & heavy
