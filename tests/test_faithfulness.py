"""Faithfulness is deletion and insertion, each compared with random patches of the same images."""

import pytest
import torch
from torch import nn

from tests.lightning_models import SmallClassifier, fit, samples
from tests.played_runs import open_run
from vitx import VitxError, metrics
from vitx.callbacks import RolloutCallback
from vitx.evaluation.perturbation import perturbation, random_order


class Needs(nn.Module):
    """A model that sees only the patch in the first corner."""

    def forward(self, images):
        return torch.stack([5 * images[:, :, :4, :4].mean((1, 2, 3)), images.new_zeros(len(images))], 1)


def by_hand(model, images, maps, **options):
    """Return deletion of a quarter, and insertion of only a quarter, each relative to random patches."""
    chance = -random_order(maps).float()

    def deletion(maps, gone):
        return metrics.deletion(model, images, maps, fractions=[gone], **options)

    def insertion(maps, gone):
        return metrics.insertion(model, images, maps, fractions=[gone], **options)

    return {
        "deletion": deletion(chance, 0.25) - deletion(maps, 0.25),
        "insertion": insertion(maps, 0.75) - deletion(chance, 0.75),
    }


def test_a_map_of_what_is_needed_beats_chance_and_its_opposite_does_not():
    images = torch.ones(6, 3, 16, 16)
    needed = torch.zeros(6, 4, 4)
    needed[:, 0, 0] = 1
    maps = {"right": needed, "wrong": 1 - needed}
    found = metrics.faithfulness(Needs(), images, maps, batch_size=4)
    for name, expected in ((name, by_hand(Needs(), images, maps[name])) for name in maps):
        for kind in ("deletion", "insertion"):
            assert torch.allclose(found[name][kind], expected[kind], atol=1e-6)
    right, wrong = ({kind: n.mean() for kind, n in found[name].items()} for name in maps)
    assert right["deletion"] > 0.1
    assert right["insertion"] > 0.1
    assert wrong["deletion"] < 0
    assert wrong["insertion"] < 0


@pytest.mark.parametrize(("measure", "logits"), [("probability", 1), ("sigmoid", 3)])
def test_one_logit_and_several_classes_at_once(measure, logits):
    class Says(Needs):
        def forward(self, images):
            return super().forward(images)[:, :1].expand(-1, logits)

    maps = torch.rand(2, 4, 4)
    images = torch.ones(2, 3, 16, 16)
    curve = perturbation(Says(), images, maps, first="most", fractions=(0, 1), measure=measure)
    assert torch.allclose(curve, torch.tensor([[5.0, 0.0]] * 2).sigmoid())


def test_of_several_fractions_it_is_the_mean_of_the_curves():
    images, maps = torch.ones(3, 3, 16, 16), torch.rand(3, 4, 4)
    shares = (0.25, 0.5, 1)
    found = metrics.faithfulness(Needs(), images, {"some": maps}, fractions=shares)["some"]
    chance = metrics.deletion(Needs(), images, -random_order(maps).float(), fractions=shares)
    wanted = chance - metrics.deletion(Needs(), images, maps, fractions=shares)
    assert torch.allclose(found["deletion"], wanted, atol=1e-6)


def test_the_random_order_of_an_image_is_its_own_and_the_same_in_any_part():
    maps = torch.rand(5, 4, 4)
    whole = random_order(maps)
    assert torch.equal(whole[3:], random_order(maps[3:], 3))
    assert all(torch.equal(one.flatten().sort().values, torch.arange(16)) for one in whole)
    assert len({tuple(one.flatten().tolist()) for one in whole}) == 5


def test_the_callback_logs_what_the_metrics_say(tmp_path, monkeypatch):
    monkeypatch.setattr("vitx.watch.explaining._BATCH", 3)  # in two batches
    callback = RolloutCallback(num_images=(2, 8), faithfulness=5, methods=["rollout", "evidence"])
    trainer, module = fit(callback, default_root_dir=tmp_path)
    images = torch.stack([image for image, *_ in samples(8, seed=1)])[:5]
    maps = callback.state_dict()["maps"]
    kind = open_run(tmp_path).facts["kind"]
    measure = "sigmoid" if kind == "classes" else "probability"
    for method in ("rollout", "evidence"):
        for name, values in by_hand(module, images, maps[method][:5], measure=measure).items():
            logged = trainer.callback_metrics[f"vitx/{method}/{name}"].item()
            assert logged == pytest.approx(values.mean().item(), abs=1e-6)
        changed = metrics.reliance(module, images, {method: maps[method][:5]})[method].mean().item()
        assert trainer.callback_metrics[f"vitx/{method}/reliance"].item() == pytest.approx(changed, abs=1e-6)
    assert list(open_run(tmp_path).numbers["vitx/evidence/deletion"]) == [0, 3, 7]


class Features(SmallClassifier):
    """A model that outputs features."""

    def forward(self, images):
        return self.vit(images)[:, None, None]

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val/loss", self.training_step(batch, 0))


def test_what_has_no_score_is_said_once_and_the_maps_are_shown():
    with pytest.warns(UserWarning, match="measures no faithfulness .* needs a target function") as said:
        trainer, _ = fit(RolloutCallback(num_images=2, faithfulness=True), module=Features)
    assert len([one for one in said if "faithfulness" in str(one.message)]) == 1
    assert "vitx/rollout/entropy" in trainer.callback_metrics


def test_bad_options_are_said():
    with pytest.raises(VitxError, match="found -1"):
        RolloutCallback(faithfulness=-1)
