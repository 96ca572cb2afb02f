"""Faithfulness is deletion and insertion, each against one random order of the same patches."""

import pytest
import torch
from torch import nn

from tests.lightning_models import SmallClassifier, fit, samples
from tests.run_folders import kept
from vitx import VitxError, metrics
from vitx.callbacks import RolloutCallback
from vitx.judging.faithfulness import FEW
from vitx.judging.perturbation import perturbation
from vitx.runs.saved import read_run


class Needs(nn.Module):
    """Sees the patch in the first corner alone."""

    def forward(self, images):
        return torch.stack([5 * images[:, :, :4, :4].mean((1, 2, 3)), images.new_zeros(len(images))], 1)


def by_hand(model, images, maps, **options):
    chance = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0))
    by_chance = metrics.deletion(model, images, chance, fractions=FEW, **options)
    return {
        "deletion": by_chance - metrics.deletion(model, images, maps, fractions=FEW, **options),
        "insertion": metrics.insertion(model, images, maps, fractions=FEW, **options) - by_chance,
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


def test_the_callback_logs_what_the_metrics_say(tmp_path):
    callback = RolloutCallback(num_images=(2, 8), faithfulness=5, methods=["rollout", "evidence"])
    trainer, module = fit(callback, default_root_dir=tmp_path)
    images = torch.stack([image for image, *_ in samples(8, seed=1)])[:5]
    maps = callback.state_dict()["maps"]
    kind = read_run(kept(tmp_path)).facts["kind"]
    measure = "sigmoid" if kind == "classes" else "probability"
    for method in ("rollout", "evidence"):
        for name, values in by_hand(module, images, maps[method][:5], measure=measure).items():
            logged = trainer.callback_metrics[f"vitx/{method}/{name}"].item()
            assert logged == pytest.approx(values.mean().item(), abs=1e-6)
        changed = metrics.reliance(module, images, {method: maps[method][:5]})[method].mean().item()
        assert trainer.callback_metrics[f"vitx/{method}/reliance"].item() == pytest.approx(changed, abs=1e-6)
    assert list(read_run(kept(tmp_path)).numbers["vitx/evidence/deletion"]) == [0, 3, 7]


class Features(SmallClassifier):
    """Puts out features."""

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
