"""Maps of a model that is randomized stage by stage."""

import copy

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vitx
from tests import models
from tests.test_stages import STAGES, Wrapped, by_name
from vitx import VitxError, metrics
from vitx.attribution.registry import _METHODS, Method
from vitx.evaluation import randomization
from vitx.evaluation.randomization import BLIND, FOLLOWS
from vitx.tape.backward import Attribution

IMAGES = models.FAMILIES["deit"].images().sigmoid() * 3.5 - 1.75  # in the range of normalized pixels
ROLLOUTS = ["rollout", "grad_rollout"]


def state(model):
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    facts = [(id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    parameters = [(id(p), p.requires_grad, id(p.grad)) for p in model.parameters()]
    return tensors, facts, parameters, torch.get_rng_state()


@pytest.mark.parametrize("fails", [False, True])
def test_model_and_generators_are_left_as_they_were(fails, monkeypatch):
    model = Wrapped(models.deit(drop_rate=0.1)).train()
    model.vit.patch_embed.requires_grad_(False).eval()
    model(IMAGES).sum().backward()
    before = state(model)
    if fails:
        monkeypatch.setattr(randomization, "rank_correlation", None)
        with pytest.raises(TypeError):
            vitx.sanity(model, IMAGES)
    else:
        vitx.sanity(model, IMAGES)
    after = state(model)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def test_it_repeats_with_its_seed():
    model = models.built("deit")
    first, again, other = (vitx.sanity(model, IMAGES, ROLLOUTS, seed=seed) for seed in (5, 5, 6))
    for name in ROLLOUTS:
        assert torch.equal(first.maps[name], again.maps[name])
        assert torch.equal(first.correlations[name], again.correlations[name])
        assert not torch.equal(first.maps[name][-1], other.maps[name][-1])


def test_the_seed_that_a_model_began_with_does_not_bring_it_back():
    one_block = models.deit(depth=1)  # drawn with seed 0, in the order of `randomize`
    found = vitx.sanity(one_block, IMAGES, ROLLOUTS, seed=0)
    assert found.stages == ("block 1",)
    assert abs(found.final("rollout")) < 0.5


def test_stages_are_randomized_one_on_top_of_the_other(monkeypatch):
    model, seen = models.built("deit"), []
    explain_methods = vitx.explain_methods

    def watched(model, *args, **kwargs):
        seen.append(({n: p.detach().clone() for n, p in model.named_parameters()}, kwargs["target"]))
        return explain_methods(model, *args, **kwargs)

    monkeypatch.setattr(randomization, "explain_methods", watched)
    found = vitx.sanity(model, IMAGES, ["grad_rollout"])
    assert found.stages == STAGES
    (intact, _), *after = seen
    target = found.intact["grad_rollout"].target
    assert len(after) == len(STAGES)
    before = intact
    for stage, (now, asked) in zip(STAGES, after, strict=True):
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed == {name for name in now if by_name(name) == stage}
        assert torch.equal(asked, target), "the classes stay those of the intact model"
        before = now


def test_numbers_are_those_of_the_maps():
    found = vitx.sanity(models.built("deit"), IMAGES, {"rollout": {"head_fusion": "max"}}, target=2)
    intact = vitx.explain(models.built("deit"), IMAGES, "rollout", head_fusion="max").maps
    assert torch.equal(found.intact["rollout"].maps, intact)
    for index in range(len(STAGES)):
        wanted = metrics.rank_correlation(found.maps["rollout"][index], intact)
        assert torch.allclose(found.correlations["rollout"][index], wanted)
    assert found.correlations["rollout"].shape == (len(STAGES), 2)
    assert found.final("rollout") == pytest.approx(found.correlations["rollout"][-1].mean().item())
    wanted = metrics.rank_correlation(intact[:1], intact[1:]).item()
    assert found.between_images["rollout"] == pytest.approx(wanted)


def test_rollout_does_not_read_the_head():
    found = vitx.sanity(models.built("deit"), IMAGES, ROLLOUTS)
    assert found.correlations["rollout"][0].tolist() == [1, 1]
    assert (found.correlations["grad_rollout"][0] < 1).all()


def test_a_model_that_is_not_changed_correlates_with_itself(monkeypatch):
    monkeypatch.setattr(randomization, "randomize", lambda *_: None)
    found = vitx.sanity(models.built("siglip"), IMAGES, ROLLOUTS)
    for name in ROLLOUTS:
        assert (found.correlations[name] == 1).all()
        assert found.verdict(name) == BLIND


@pytest.mark.parametrize(
    "family",
    ["distilled deit", "siglip", "hybrid", "hf vit, sdpa", "hf deit, eager", "torchvision", "open_clip"],
)
def test_families(family):
    family, model = models.FAMILIES[family], models.built(family)
    target = None if family.classes else lambda features: features[:, 0]
    found = vitx.sanity(model, family.images(), ROLLOUTS, target=target)
    assert found.stages == STAGES
    for name in ROLLOUTS:
        assert found.correlations[name].isfinite().all()
        assert (found.correlations[name][-1] < 0.99).all()


def test_under_inference_mode_and_in_half_precision():
    model = copy.deepcopy(models.built("deit")).bfloat16()
    with torch.inference_mode():
        found = vitx.sanity(model, IMAGES.bfloat16(), ROLLOUTS)
    assert found.correlations["grad_rollout"].isfinite().all()


def fixed(way):
    """Return the same blob for every model and image."""
    y, x = torch.meshgrid(torch.arange(4) - 2, torch.arange(4) - 2, indexing="ij")
    blob = (-(x**2 + y**2) / 8).exp().expand(len(IMAGES), -1, -1)
    return Attribution(blob, torch.ones(len(IMAGES)))


def refusing(way):
    raise VitxError("this model is not to my taste")


def test_a_blind_method_is_found_out(monkeypatch):
    monkeypatch.setitem(_METHODS, "blob", Method(fixed, "blob"))
    found = vitx.sanity(models.built("deit"), IMAGES, ["rollout", "blob"])
    assert (found.correlations["blob"] == 1).all()
    assert found.verdict("blob") == BLIND
    assert found.verdict("rollout") != BLIND
    wanted = "blob barely changes: the correlation with its maps as trained is still 1.00 when nothing "
    assert found.sentence("blob") == f"{wanted}learned is left; maps of different images correlate 1.00"


class TestMethods:
    def test_by_default_all_but_the_slow_ones(self, monkeypatch):
        monkeypatch.setitem(_METHODS, "flow", Method(refusing, "flow", slow=True))
        found = vitx.sanity(models.built("deit"), IMAGES)
        assert {*found.maps, *found.left_out} == set(vitx.methods()) - {"flow"}
        assert list(found.maps)[:2] == ROLLOUTS

    def test_one_that_refuses_the_model(self, monkeypatch):
        monkeypatch.setitem(_METHODS, "picky", Method(refusing, "picky"))
        found = vitx.sanity(models.built("deit"), IMAGES)
        assert found.left_out["picky"] == "this model is not to my taste"
        assert "rollout" in found.maps
        with pytest.raises(VitxError, match="not to my taste"):
            vitx.sanity(models.built("deit"), IMAGES, ["rollout", "picky"])

    def test_all_refuse(self):
        with pytest.raises(VitxError, match="no attention between tokens"):
            vitx.sanity(timm.create_model("resnet10t", num_classes=3), IMAGES)

    def test_a_name_alone(self):
        assert list(vitx.sanity(models.built("deit"), IMAGES, "rollout").maps) == ["rollout"]


class Uncopied(Wrapped):
    def __deepcopy__(self, memo):
        raise RuntimeError("only leaves can be copied\nand so on")


class Frozen(nn.Module):
    """A model of attention without parameters."""

    def forward(self, images):
        tokens = images.flatten(2).mT[:, None]
        for _ in range(2):
            tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return tokens[:, 0].mean(1)

    patch_size = 1


@pytest.mark.parametrize(
    ("model", "words", "sentence"),
    [
        ("deit", {"methods": []}, "methods must be names, .* the methods are rollout"),
        ("deit", {"methods": ["nope"]}, "there is no method 'nope'"),
        ("deit", {"methods": {"rollout": {"depth": 3}}}, "has no option 'depth'"),
        ("deit", {"seed": -1}, r"seed must be a whole number from 0 to 2\*\*63 - 1, found -1"),
        ("deit", {"seed": 0.5}, "found 0.5"),
        ("deit", {"target": 9}, "target 9 is out of range"),
        ("deit", {"images": torch.utils.data.DataLoader([1])}, "not a DataLoader"),
        ("deit", {"images": IMAGES[0]}, "add a batch dimension"),
        (Uncopied(models.deit()), {}, "the model cannot be copied, .*: only leaves can be copied$"),
        (Frozen(), {"methods": ["rollout"], "images": IMAGES[..., :6, :6]}, "the model has no parameters"),
    ],
)
def test_refusals(model, words, sentence):
    model = models.built(model) if isinstance(model, str) else model
    with pytest.raises(VitxError, match=sentence):
        vitx.sanity(model, **{"images": IMAGES, "methods": None, **words})


@pytest.fixture
def found():
    return vitx.sanity(models.built("deit"), IMAGES, ROLLOUTS)


class TestWhatIsShown:
    def test_table(self, found):
        lines = str(found).splitlines()
        assert lines[0].split() == ["randomized", "down", "to", *ROLLOUTS]
        assert lines[1].split() == ["head", "1.00", f"{found.correlations['grad_rollout'][0].mean():.2f}"]
        assert [line.rsplit(None, 2)[0] for line in lines[1:]] == [
            *STAGES,
            "mean of all stages",
            "different images",
        ]
        assert len({len(line) for line in lines}) == 1, "columns are aligned"

    def test_of_one_image(self):
        alone = vitx.sanity(models.built("deit"), IMAGES[:1], ["rollout"])
        assert "nan" not in str(alone).lower()
        assert "different images" not in alone.sentence("rollout")

    def test_picture(self, found, tmp_path):
        found.save(tmp_path / "a.png")
        picture = np.asarray(Image.open(tmp_path / "a.png"))
        assert picture.shape == (19 + 2 * (19 + 170 + 5) + 38, 5 + 6 * 175, 3)

        def tile(row, column):
            top, left = 38 + row * 194, 5 + column * 175
            return picture[top : top + 170, left : left + 170].astype(int)

        assert (tile(0, 1) == tile(0, 2)).all(), "rollout does not read the head"
        for row, name in enumerate(ROLLOUTS):
            drawn = Image.fromarray(found.intact[name].overlays()[0].numpy()).resize(
                (170, 170), Image.Resampling.BICUBIC
            )
            assert np.abs(tile(row, 1) - np.asarray(drawn)).max() <= 1
            assert np.abs(tile(row, 1) - tile(row, 5)).mean() > 5

    def test_only_png(self, found, tmp_path):
        with pytest.raises(VitxError, match=r"pictures are written as \.png"):
            found.save(tmp_path / "a.jpg")


def spots(count, seed):
    """Return noise with a spot in one patch, the classes (the colors of the spots), and their places."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 64, 64, generator=generator)
    classes, rows, columns = (torch.randint(most, (count,), generator=generator) for most in (3, 8, 8))
    for index, (label, row, column) in enumerate(zip(classes, rows, columns, strict=True)):
        images[index, label, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 2
    return images, classes, rows * 8 + columns


def trained():
    """Train two blocks to find the spot, which takes a few seconds."""
    options = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 3}
    model = timm.create_model("deit_tiny_patch16_224", **options)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        images, classes, _ = spots(64, step)
        loss = nn.functional.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_rollouts_of_a_trained_model_follow_it():
    images, classes, places = spots(32, 10**6)
    found = vitx.sanity(trained(), images, ROLLOUTS)

    def pointing(maps):
        return (maps.flatten(1).argmax(1) == places).float().mean()

    assert (found.intact["rollout"].logits.argmax(1) == classes).float().mean() > 0.95
    assert pointing(found.intact["rollout"].maps) > 0.9, "it looks at the spot"
    assert pointing(found.maps["rollout"][-1]) < 0.2, "and no longer, when it has learned nothing"
    for name in ROLLOUTS:
        assert abs(found.final(name)) < 0.15
        assert found.verdict(name) == FOLLOWS
    assert found.correlations["grad_rollout"][0].mean() < 0.5, "it falls with the head"
    assert "falls below 0.71 at 'head'" in found.sentence("grad_rollout")
    assert "falls below 0.71 at 'block 1'" in found.sentence("rollout")
