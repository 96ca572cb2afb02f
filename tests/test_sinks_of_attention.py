"""Sinks: patches that most queries attend to are found, marked and left out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.models import SwinTransformer, VisionTransformer

import vitx
from vitx import VitxError
from vitx.cli.asking import Request
from vitx.cli.findings import Finding, Map, Product
from vitx.cli.model import Subject
from vitx.functional.sinks import sinks
from vitx.functional.weights import Weights
from vitx.inputs.preprocessing import Preprocessing
from vitx.pictures.views import painted

SIZES = {64: (64, 4, 4), 96: (48, 5, 3)}  # image size: width, depth and heads


def planted(size, places, seed=0, logit=4.0):
    """Return a random model in which some patches have a large norm, and all queries point to their keys."""
    torch.manual_seed(seed)
    width, depth, heads = SIZES[size]
    model = VisionTransformer(size, 8, num_classes=5, embed_dim=width, depth=depth, num_heads=heads).eval()
    direction = torch.randn(width)
    direction = (direction - direction.mean()) / direction.std()
    with torch.no_grad():
        model.pos_embed[0, [1 + place for place in places]] += 5 * direction
        for block in model.blocks if places else ():
            keys = (block.attn.qkv.weight[width : 2 * width] @ direction).view(heads, -1)
            keys = keys / keys.square().sum(1, keepdim=True) * logit * (width // heads) ** 0.5
            block.attn.qkv.bias[:width] = keys.flatten()
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_planted_sinks_are_found_and_left_out(size, count):
    cells = (size // 8) ** 2
    places = torch.randperm(cells, generator=torch.Generator().manual_seed(count))[:count].tolist()
    model, images = planted(size, places), torch.rand(2, 3, size, size)
    expected = torch.zeros(2, cells, dtype=torch.bool)
    expected[:, places] = True
    for method in ("rollout", "grad_rollout"):
        found = vitx.explain(model, images, method)
        assert torch.equal(found.sinks.flatten(1), expected)
        without = vitx.explain(model, images, method, without_sinks=True)
        assert (without.conservation - 1).abs().max() < 1e-4
        if count == 0:
            assert torch.allclose(without.maps, found.maps, atol=1e-6)
        else:
            assert (without.maps * without.sinks).sum() < 1e-6 < (found.maps * found.sinks).sum()


def test_models_without_any_have_none():
    for seed in range(20):
        size = [*SIZES][seed % 2]
        assert not vitx.explain(planted(size, [], seed), torch.rand(1, 3, size, size)).sinks.any()


def test_rollout_without_sinks_is_that_of_a_without_their_columns():
    model, images = planted(64, [3, 40]), torch.rand(1, 3, 64, 64)
    found = vitx.explain(model, images, without_sinks=True)
    with torch.no_grad(), vitx.capture(model) as trace:
        model(images)
    layers = trace.attentions()
    for layer in layers:
        layer[..., [4, 41]] = 0
        layer /= layer.sum(-1, keepdim=True)
    expected = vitx.attention_rollout(layers)[:, 1:]
    shares = found.maps.flatten(1) / found.maps.sum() * expected.sum()
    assert torch.allclose(shares, expected, atol=1e-6)


def test_half_of_the_queries_or_of_the_layers_are_not_most():
    even = torch.full((1, 2, 16, 16), 1 / 16)
    drawn = torch.full_like(even, 0.5 / 15)
    drawn[..., 5] = 0.5
    half = even.clone()
    half[:, :, ::2] = drawn[:, :, ::2]
    assert sinks([[Weights.of(drawn)]] * 2 + [[Weights.of(even)]]).nonzero().tolist() == [[0, 5]]
    assert not sinks([[Weights.of(drawn)], [Weights.of(even)]]).any()
    assert not sinks([[Weights.of(half)]] * 3).any()


def test_where_tokens_differ_they_are_not_told():
    model = SwinTransformer(
        64, 4, num_classes=3, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4
    )
    model.eval()
    images = torch.rand(1, 3, 64, 64)
    assert vitx.explain(model, images).sinks is None
    with pytest.raises(VitxError, match="same tokens in all layers"):
        vitx.explain(model, images, without_sinks=True)


@pytest.fixture
def said(monkeypatch):
    """Return the notes below the pictures that are drawn."""
    notes, draw = [], vitx.pictures.render.grid
    monkeypatch.setattr("vitx.pictures.render.grid", lambda *a, **k: notes.append(k["note"]) or draw(*a, **k))
    return notes


def test_the_command_rings_them(said):
    images = torch.rand(1, 3, 64, 64)
    found = vitx.explain(planted(64, [9]), images)
    prepare = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    product = Product(Subject(torch.nn.Identity(), prepare, 5, None, {"rollout": {}}), (".png",))
    for kept in (found, replace(found, sinks=None)):
        one = Map(Request(), kept)
        pixels, logits = found.pixels()[0], found.logits[0]
        product.drawn(Finding(0, Path("x.png"), images[0], pixels, "", logits=logits, maps=(one,)))
    assert ["rings" in one for one in said] == [True, False]


def test_the_picture_rings_them_and_the_legend_says_so(said):
    images = torch.rand(1, 3, 64, 64)
    for places in ([], [9]):
        vitx.explain(planted(64, places), images).picture()
    assert ["rings" in one for one in said] == [False, True]
    marks = torch.zeros(1, 8, 8, dtype=torch.bool)
    marks[0, 1, 2] = True
    drawn = painted(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), sinks=marks)
    changed = drawn[0].any(-1).nonzero()
    assert drawn.shape == (1, 256, 256, 3)
    assert changed.amin(0).tolist() == [32, 64]
    assert changed.amax(0).tolist() == [63, 95]
