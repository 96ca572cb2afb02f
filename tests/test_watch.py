"""Watches in custom training loops: what they take, when they fire, and all they see is written."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, SubsetRandomSampler

import vitx
from tests import run_folders
from tests.lightning_models import IMAGE, samples
from tests.loops import IMAGES, Net, held_out, watching
from tests.played_runs import open_run
from tests.run_folders import events, shown
from vitx import VitxError, Watch
from vitx.runs.folder import read_facts


@pytest.fixture
def net():
    return Net()


def test_the_numbers_are_those_of_the_core(net, tmp_path):
    numbers = watching(tmp_path, net, num_images=4)(0)
    images = torch.stack([held_out().dataset[place][0] for place in (1, 3, 5, 7)])
    maps = vitx.explain(net, images, "grad_rollout").maps
    assert numbers["vitx/grad_rollout/entropy"] == pytest.approx(vitx.metrics.entropy(maps).mean().item())
    assert 0 < numbers["vitx/grad_rollout/pointing"] < 1


class Batches:
    def __iter__(self):
        return iter([(IMAGES, torch.tensor([0, 1, 2]))])


DATA = {
    "a loader": (2, DataLoader(samples(8), sampler=SubsetRandomSampler([1, 5]))),
    "a data set": (8, samples(8)),
    "a tensor": (3, IMAGES),
    "several loaders": (8, {"one": DataLoader(samples(8)), "two": DataLoader(samples(4))}),
    "batches of one's own": (3, Batches()),
    "a list of samples": (3, [{"image": image, "label": 1} for image in IMAGES]),
    "one batch": (6, [torch.cat([IMAGES, IMAGES]), torch.arange(6) % 3]),
    "a batch with names": (3, {"pixel_values": IMAGES, "labels": torch.arange(3)}),
    "an array": (3, IMAGES.numpy()),
}


@pytest.mark.parametrize(("count", "data"), DATA.values(), ids=DATA)
def test_what_images_are_taken_from(count, data, tmp_path):
    watch = watching(tmp_path, data=data, logger=False)
    assert watch(0)
    assert len(watch.state_dict()["maps"]["rollout"]) == count
    assert (tmp_path / "vitx" / "maps.png").exists()


def test_image_files_go_through_the_models_own_transform(tmp_path):
    photo, model = Image.effect_noise((60, 40), 80).convert("RGB"), timm.create_model("test_vit")
    photo.save(tmp_path / "photo.png")
    watch = watching(tmp_path, model, [tmp_path / "photo.png"])
    assert watch(0)
    images = create_transform(**resolve_data_config(model=model))(photo)[None]
    wanted = vitx.explain(model, images, "grad_rollout").maps
    assert torch.equal(watch.state_dict()["maps"]["grad_rollout"], wanted)


def test_a_batch_transform_of_given_images(net, tmp_path):
    watch = watching(tmp_path, net, IMAGES, batch_transform=lambda batch: (2 * batch, [0, 1, 2]))
    watch(0)
    maps = vitx.explain(net, 2 * IMAGES, "grad_rollout").maps
    assert torch.equal(watch.state_dict()["maps"]["grad_rollout"], maps)


def test_places_of_a_data_set(tmp_path):
    watch = watching(tmp_path, data=samples(8), images=[6, 2])
    watch(0)
    assert watch.state_dict()["places"] == (6, 2)


def test_fires_once_for_each_step_and_every_n(tmp_path):
    watch = watching(tmp_path, every_n_steps=3)
    fired = [step for step in (0, 1, 2, 3, 3, 4, 6) if watch(step)]
    assert fired == shown(tmp_path) == [0, 3, 6]


class Masked(Net):
    """A model that hides half of the patches at random, as masked autoencoders do."""

    def forward(self, images):
        tokens = self.vit.pos_embed[:, 1:] + self.vit.patch_embed(images)
        count = tokens.shape[1]
        kept = torch.rand(len(images), count, device=images.device).argsort(1)[:, : count // 2, None]
        tokens = self.vit.blocks(tokens.gather(1, kept.expand(-1, -1, tokens.shape[2])))
        return self.head(self.norm(self.vit.norm(tokens).mean(1)))


def test_a_model_that_hides_patches_at_random_hides_the_same_ones_again(tmp_path):
    watch = watching(tmp_path, Masked())
    watch(step=0)
    torch.rand(7)  # a training draws numbers meanwhile
    numbers = watch(step=1)
    assert {n for n in numbers if n.endswith("drift")}
    assert all(number < 1e-6 for name, number in numbers.items() if name.endswith("drift"))


def test_a_resumed_run_goes_on_where_it_stopped(net, tmp_path):
    watch = watching(tmp_path, net)
    watch(0)
    watch(5)
    torch.save(watch.state_dict(), tmp_path / "state.pt")
    watch(7)  # before it is killed
    again = watching(tmp_path, net)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert not again(5), "it was shown before the stop"
    assert "vitx/rollout/drift" in again(7)
    assert shown(tmp_path) == [0, 5, 7], "a step is shown twice"
    assert run_folders.steps(tmp_path) == [0, 5, 7]


def test_a_closed_watch_has_seen_its_training_end(tmp_path):
    with watching(tmp_path / "whole") as watch:
        watch(0)
    assert read_facts(tmp_path / "whole" / "vitx")["ended"]
    found = events(tmp_path / "whole")
    assert [event.step for event in found.Images("vitx/overview")] == [0]
    watch.close()  # may be called twice
    with pytest.raises(VitxError, match="this watch is closed"):
        watch(1)
    with suppress(ZeroDivisionError), watching(tmp_path / "broken") as watch:
        watch(0)
        _ = 1 / 0
    assert not read_facts(tmp_path / "broken" / "vitx").get("ended")


def test_a_second_run_does_not_mix_with_the_first(net, tmp_path, capsys):
    for count in (3, 2):
        watch = watching(tmp_path / "run", net)
        for step in range(count):
            watch(step)
    assert run_folders.steps(tmp_path / "run") == shown(tmp_path / "run") == [0, 1, 2]
    assert run_folders.steps(tmp_path / "run-1") == shown(tmp_path / "run-1") == [0, 1]
    assert capsys.readouterr().err.count("run holds another run") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "a watch needs a place to write to"),
        ({"log_dir": "x", "at_start": False}, "at_start is for callbacks: a watch fires when it is called"),
        ({"log_dir": "x", "methods": ["saliency"]}, "there is no method 'saliency'"),
        ({"log_dir": "x", "data": "."}, r"'\.' is a folder: give image files in a list, or a data set"),
        ({"log_dir": "x", "data": Path("a.jpg")}, r"'a\.jpg' is a path: give image files in a list"),
        ({"log_dir": "x", "data": 42}, "images must be a tensor, a data set"),
        ({"log_dir": "x", "data": IMAGES, "images": [1]}, "images selects from data sets or loaders, and"),
        ({"log_dir": "x", "data": IMAGES, "dataloader_idx": 4}, "dataloader_idx selects from data sets or"),
        ({"log_dir": "x", "data": None}, "a watch needs images: give a validation loader"),
        ({"log_dir": "x", "log_di": "y"}, r"Watch has no option 'log_di': did you mean log_dir\?"),
        ({"log_dir": "x", "logger": object()}, "a logger must be a SummaryWriter, .* found object"),
        ({"log_dir": "x", "model": "deit"}, "must be a torch.nn.Module, found str"),
        ({"log_dir": "x", "weights": "ema"}, "needs averaged weights"),
        ({"log_dir": "x", "normalization": ([0.5] * 2, [1.0])}, "mean has 2 values for 3 channels"),
    ],
)
def test_says_what_is_wrong(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VitxError, match=sentence):
        Watch(**{"model": Net(), "data": held_out(), "on_error": "raise"} | options)(0)


def test_a_step_is_a_whole_number(tmp_path):
    with pytest.raises(VitxError, match="step must be a whole number, found 'a'"):
        watching(tmp_path, on_error="warn")("a")


def test_an_explanation_that_fails_is_said_and_the_loop_goes_on(tmp_path):
    watch = watching(tmp_path, data=torch.rand(2, 5, IMAGE, IMAGE), on_error="warn")
    with pytest.warns(UserWarning, match="shows nothing at step 0: the model refused .* got 5 channels"):
        assert not watch(0)
    assert not watch(1)


def test_nothing_is_said_of_the_colors_of_a_spectrogram(tmp_path, capsys):
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = package.ASTForAudioClassification(package.ASTConfig(**sizes, max_length=96, num_mel_bins=64))
    sounds = [{"input_values": torch.randn(96, 64), "labels": number % 2} for number in range(3)]
    watch = watching(tmp_path, model, DataLoader(sounds, 3))
    watch(0)
    assert "color" not in capsys.readouterr().err
    found = open_run(tmp_path)
    assert "color" not in found.facts["note"]
    assert len(np.unique(found.pixels)) > 200


def test_says_at_first_what_was_found_where_nobody_listens(tmp_path, capsys):
    watching(tmp_path, num_images=2)(0)
    said = capsys.readouterr().err
    assert said.startswith("Watch watches 2 of 8 images of TensorDataset; images: item 0 of a batch; ")
    assert said.endswith(f"; pictures: {tmp_path}; maps: {tmp_path / 'vitx'}\n")
