"""Every method against its oracle."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch.nn.modules.module import _global_forward_hooks

import vitx
from tests import models, oracle
from tests.modules import Around
from vitx import VitxError, explain
from vitx.attribution.evidence import ranked
from vitx.functional import tiles
from vitx.pictures.views import all_against
from vitx.tape import kernels

IMAGES = models.FAMILIES["deit"].images()
# Families whose layers can be scored one by one; legrad refuses the others.
LAYERED = [name for name in models.FAMILIES if not name.startswith(("hf", "torchvision", "open_clip"))]


def check(name, **wanted):
    """Compare the maps of methods, {method: (maps of the oracle, options)}, in float64 and in float32."""
    family = models.FAMILIES[name]
    asked = {method: options for method, (_, options) in wanted.items()}
    for dtype, tolerance in ((torch.float64, 1e-9 if family.exact else 1e-6), (torch.float32, 1e-4)):
        given = models.built(name, dtype), family.images(dtype=dtype)
        for method, explanation in vitx.explain_methods(*given, asked, target=family.target).items():
            found, (maps, _) = explanation.maps, wanted[method]
            assert found.dtype == dtype
            assert tuple(found.shape) == (2, *family.grid)
            error = (found.double().flatten(1) - maps).abs().amax(1)
            assert (error <= tolerance * maps.amax(1)).all(), method


def observed(name):
    family, double = models.FAMILIES[name], torch.float64
    return oracle.observe(models.built(name, double), family.images(dtype=double), family.target)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_gae_and_attention_equal_their_oracles(name):
    family, seen = models.FAMILIES[name], observed(name)
    token = family.prefix, family.readout
    check(name, attention=(oracle.attention_maps(seen, *token), {}))
    check(
        name,
        gae=(oracle.gae_maps(seen, *token), {}),
        attention=(oracle.attention_maps(seen, *token, "max"), {"head_fusion": "max"}),
    )
    check(name, gae=(oracle.gae_maps(seen, *token, start_layer=1), {"start_layer": 1}))


@pytest.mark.parametrize("name", ["siglip", "perception encoder"])
def test_a_pool_fuses_its_heads_also_where_they_are_not_kept(name, monkeypatch):
    """As on a GPU, or in large images, where A is computed from queries and keys on demand."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    test_gae_and_attention_equal_their_oracles(name)


@pytest.mark.parametrize("name", LAYERED)
def test_legrad_equals_its_oracle(name):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    for first in (0, 2):
        wanted = oracle.legrad_maps(model, images, None, family.prefix, first)
        check(name, legrad=(wanted, {"start_layer": first}))


@pytest.mark.parametrize("name", LAYERED)
def test_evidence_equals_its_oracle(name):
    family = models.FAMILIES[name]
    if family.readout not in ("token", "distilled", "patches", "all"):
        pytest.skip("a pooling has streams of its own: its parts and its completeness are tested elsewhere")
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    if type(model.blocks[0]).__name__ == "ResPostBlock":
        pytest.skip("its blocks are not laid out as the oracle has it")
    for first in (0, 1):
        wanted = oracle.evidence_signed(model, images, None, family.prefix, family.readout, first)
        found = explain(model, images, "evidence", start_layer=first)
        error = (found.signed.flatten(1) - wanted).abs().amax(1)
        assert (error <= 1e-9 * wanted.abs().amax(1)).all()
        order = found.maps.flatten(1).argsort(1), found.signed.flatten(1).argsort(1)
        assert torch.equal(*order)
        assert (found.maps >= 0).all()


class OverChannels(torch.nn.Module):
    """A residual around attention over channels, as in XCiT, and one around attention between tokens.

    Everything is linear except the attention weights, which are detached.
    """

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 8, 2, 2)
        self.first, self.second = torch.nn.Linear(8, 24), torch.nn.Linear(8, 24)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.first(x).chunk(3, -1)
        x = one = x + (v @ (k.mT @ q).softmax(-2).detach())
        q, k, v = self.second(x).chunk(3, -1)
        self.a = (q @ k.mT).softmax(-1).detach().requires_grad_(torch.is_grad_enabled())
        x = x + self.a @ v
        self.streams = [one, x]
        return self.head(x.mean(1))


class TestEvidence:
    @pytest.mark.parametrize("fused", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, fused):
        model = models.deit() if fused else models.without_fused_attention()
        plain = explain(model, IMAGES, "evidence").maps
        models.checkpointed(model).train()  # timm uses checkpointing only in training mode
        assert torch.allclose(explain(model, IMAGES, "evidence").maps, plain, rtol=1e-4)

    @pytest.mark.parametrize("others", [["rollout"], ["grad_rollout"], ["rollout", "gae", "legrad"]])
    def test_stands_beside_other_methods(self, others):
        alone = explain(models.built("deit"), IMAGES, "evidence").signed
        names = [others[0], "evidence", *others[1:]]
        found = vitx.explain_methods(models.built("deit"), IMAGES, {name: {} for name in names})
        assert list(found) == names
        assert torch.allclose(found["evidence"].signed, alone, rtol=1e-4, atol=1e-7)

    def test_stands_beside_the_gradient_of_the_papers(self):
        asked = {"evidence": {}, "rollout": {}, "grad_rollout": {"gradient": "plain"}}
        found = vitx.explain_methods(models.built("deit"), IMAGES, asked)
        assert list(found) == list(asked)
        for name, options in asked.items():
            alone = explain(models.built("deit"), IMAGES, name, **options)
            assert torch.allclose(found[name].maps, alone.maps, rtol=1e-4), name

    def test_a_class_that_nothing_speaks_for_has_a_map_of_zeros(self):
        found = explain(models.built("deit"), IMAGES, "evidence", target=lambda logits: 0 * logits[:, 0])
        assert (found.maps == 0).all()

    def test_where_all_speaks_against_the_map_keeps_the_order_and_the_picture_says_so(self):
        found = explain(models.built("deit"), IMAGES, "evidence")
        signed = -found.signed.abs() - 1
        maps = ranked(signed)
        assert maps.flatten(1).argsort(1).equal(signed.flatten(1).argsort(1))
        assert all_against(signed).all()
        assert not all_against(found.signed).any()
        said, silent = (replace(found, maps=maps, signed=one).picture() for one in (signed, None))
        assert not np.array_equal(said, silent)

    def test_what_speaks_for_one_class_speaks_against_its_negative(self):
        target = lambda logits: logits[:, 1]  # noqa: E731
        found = explain(models.built("deit"), IMAGES, "evidence", target=target)
        turned = explain(models.built("deit"), IMAGES, "evidence", target=lambda x: -target(x))
        assert torch.allclose(found.signed, -turned.signed, atol=1e-6)

    def test_residuals_of_attention_over_channels_count(self):
        torch.manual_seed(0)
        model, images = OverChannels().double().eval(), torch.randn(2, 3, 8, 8).double()
        score = model(images)[:, 1].sum()
        streams = torch.autograd.grad(score, model.streams)
        added = sum((x * g).sum(-1) for x, g in zip(model.streams, streams, strict=True))
        (gradient,) = torch.autograd.grad(model(images)[:, 1].sum(), model.a)
        taken = (model.a * gradient).sum(1)
        wanted = sum(part / part.abs().sum(1, keepdim=True) for part in (added, taken))
        found = explain(model, images, "evidence", target=1).signed.flatten(1)
        torch.testing.assert_close(found, wanted.detach())

    def test_no_other_method_has_a_sign(self):
        assert explain(models.built("deit"), IMAGES, "gae").signed is None


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_attention_that_merges_tokens_fuses_its_heads_also_where_they_are_not_kept(fusion, monkeypatch):
    """Hiera merges tokens by attentions without a residual, below the last layer."""
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", img_size=64, num_classes=5).eval()
    kept = explain(model, torch.rand(1, 3, 64, 64), "attention", head_fusion=fusion)
    monkeypatch.setattr(kernels, "SMALL", 0)
    anew = explain(model, kept.images, "attention", head_fusion=fusion)
    torch.testing.assert_close(anew.maps, kept.maps, rtol=1e-3, atol=1e-6)


def test_masks_that_depend_on_the_image_have_a_plain_gradient():
    """SAM adds its relative positions, which depend on the queries, as the mask of a fused kernel."""
    options = {"img_size": 64, "depth": 1, "global_attn_indexes": (0,), "num_classes": 5}
    model = timm.create_model("samvit_base_patch16", embed_dim=48, num_heads=3, **options).eval()
    found = explain(model, torch.rand(1, 3, 64, 64), "gae", gradient="plain", target=1)
    assert found.conservation == pytest.approx(1, abs=1e-3)


def test_without_attention_between_tokens_there_is_none_to_show():
    model = timm.create_model("edgenext_xx_small", num_classes=5).eval()
    with pytest.raises(VitxError, match="no attention between tokens leads to the output"):
        explain(model, torch.rand(1, 3, 64, 64), "attention")


def test_tiles_of_rows_give_the_same_maps(monkeypatch):
    whole = {method: explain(models.built("deit"), IMAGES, method).maps for method in vitx.methods()}
    monkeypatch.setattr(tiles, "_room", lambda device: 3 * 17 * 5)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 5)
    monkeypatch.setattr(kernels, "SMALL", 0)
    for method, maps in whole.items():
        assert torch.allclose(explain(models.built("deit"), IMAGES, method).maps, maps, rtol=1e-4), method


@pytest.mark.parametrize("fusions", [("max", "max"), ("max", "min")])
def test_methods_that_read_fused_heads_share_them_if_they_are_the_same(fusions):
    options = dict(
        zip(("rollout", "attention"), ({"head_fusion": fusion} for fusion in fusions), strict=True)
    )
    together = vitx.explain_methods(models.built("deit"), IMAGES, options)
    for name, found in together.items():
        alone = explain(models.built("deit"), IMAGES, name, **options[name])
        assert torch.allclose(found.maps, alone.maps, rtol=1e-4), name


def test_methods_together_give_what_each_gives_alone():
    together = vitx.explain_methods(
        models.built("deit"), IMAGES, {name: {} for name in vitx.methods()}, target=3
    )
    for name, found in together.items():
        alone = explain(models.built("deit"), IMAGES, name, target=3)
        assert torch.allclose(found.maps, alone.maps, rtol=1e-4), name
        assert (found.target is None) == (name in ("rollout", "attention", "flow"))


def test_linearized_is_as_linearised():
    maps = [explain(models.built("deit"), IMAGES, "gae", gradient=f"lineari{z}ed").maps for z in "sz"]
    assert torch.equal(*maps)
    with pytest.raises(VitxError, match="gradient must be one of linearised, plain, found 'other'"):
        explain(models.built("deit"), IMAGES, "gae", gradient="other")


class TestLegrad:
    def test_refuses_blocks_of_several_outputs(self):
        model = timm.create_model("tnt_s_patch16_224", img_size=32, depth=1, num_classes=5).eval()
        with pytest.raises(VitxError, match="cannot be scored one by one"):
            explain(model, torch.rand(1, 3, 32, 32), "legrad")

    def test_scores_what_the_target_function_says(self):
        model, images = models.built("deit", torch.float64), IMAGES.double()

        def contrast(logits):
            return logits[:, 1] - logits[:, 4]

        wanted = oracle.legrad_maps(model, images, contrast, 1)
        found = explain(model, images, "legrad", target=contrast).maps.flatten(1)
        assert torch.allclose(found, wanted, rtol=1e-9)

    def test_refuses_a_model_whose_layers_cannot_be_scored(self):
        family = models.FAMILIES["torchvision"]
        with pytest.raises(VitxError, match="the layers of VisionTransformer cannot be scored one by one"):
            explain(models.built("torchvision"), family.images(), "legrad")

    def test_refuses_a_model_that_goes_on_behind_its_head(self):
        longer = torch.nn.Sequential(models.built("deit"), torch.nn.Linear(models.CLASSES, 3))
        with pytest.raises(VitxError, match=r"scores of shape \[\(2, 7\)\].* an output of shape \(2, 3\)"):
            explain(longer, IMAGES, "legrad")

    def test_finds_the_model_in_a_wrapper_and_leaves_no_hook(self):
        model = models.built("deit")
        wrapped = Around(lambda teacher, model, x: model(x), models.deit(), model)  # the teacher does not run
        found = explain(wrapped, IMAGES, "legrad").maps
        assert torch.equal(found, explain(model, IMAGES, "legrad").maps)
        assert not _global_forward_hooks
        with pytest.raises(VitxError, match="failed on the output"):
            explain(model, IMAGES, "legrad", target=lambda logits: logits @ torch.ones(3))
        assert not _global_forward_hooks
        assert not any(module._forward_hooks for module in model.modules())
