"""Training on a folder of the user's own images from the command line: its output and its refusals."""

import shutil
import sys
from collections import Counter
from csv import DictReader
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.models._hub import has_hf_hub

import train_demo
from tests import run_folders
from vitx.models.checkpoints import create_model

CONFIG = Path(train_demo.__file__).parent / "configs" / "deit_tiny_imagefolder.yaml"
TINY = {
    "--model.pretrained": "false",
    "--model.model_options.img_size": "32",
    "--model.model_options.depth": "1",
    "--trainer.accelerator": "cpu",
    "--trainer.enable_model_summary": "false",
    "--data.workers": "0",
}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Return a function that runs `python train_demo.py` with a small config in a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def run(root, *more, command="fit", **changes):
        options = TINY | {f"--data.{key}": value for key, value in changes.items()}
        root = [] if root is None else ["--data.root", str(root)]
        words = [
            command,
            "--config",
            str(CONFIG),
            *root,
            *(word for pair in options.items() for word in pair),
        ]
        monkeypatch.setattr(sys, "argv", ["train_demo.py"])
        train_demo.main([*words, *more])

    return run


@pytest.fixture
def refused(command, capsys):
    """Return a function that runs the command line, which must fail with one sentence, and returns that."""

    def run(*args, **changes):
        with pytest.raises(SystemExit) as caught:
            command(*args, "--trainer.fast_dev_run=true", **changes)
        assert caught.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize("name", ["fit", "validate", "predict"])
def test_config_runs(command, pets, capsys, name):
    command(pets, "--trainer.fast_dev_run=true", command=name)
    if name == "fit":
        assert "val/accuracy" in capsys.readouterr().out
        assert Path("after_training.png").is_file()


class TestRefusals:
    def test_no_folder_was_given(self, refused):
        assert refused(None) == "error: no folder of images was given: give one with --data.root FOLDER"

    def test_folder_is_missing(self, refused):
        assert refused("nowhere").startswith("error: there is no folder nowhere: give one")

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_image_is_broken(self, refused, pets, workers):
        for path in pets.rglob("*.jpg"):
            path.write_text("no image")
        sentence = refused(pets, workers=workers)
        assert sentence.startswith(f"error: {pets}")
        assert sentence.endswith(".jpg is not an image file that can be read; replace or remove it")

    def test_hub_cannot_be_reached(self, refused, pets, monkeypatch, tmp_path):
        from huggingface_hub import constants

        if not has_hf_hub():
            pytest.skip(f"timm {timm.__version__} cannot use the huggingface_hub that is installed")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "nothing cached"))
        sentence = refused(pets, "--model.pretrained=true")
        assert sentence.startswith(
            "error: the weights of deit_tiny_patch16_224 could not be fetched from the hub: "
        )

    def test_model_is_unknown(self, refused, pets):
        sentence = refused(pets, "--model.model_name=deit_teeny_patch16_224")
        assert sentence.startswith("error: timm has no model 'deit_teeny_patch16_224'; similar names: deit")

    def test_weights_have_an_unknown_tag(self, refused, pets):
        name = "--model.model_name=deit_tiny_patch16_224.nothing"
        assert refused(pets, name).startswith(
            "error: timm has no such weights of deit_tiny_patch16_224.nothing"
        )

    def test_weights_are_missing(self, refused, pets):
        assert refused(pets, "--model.weights=no.pth") == "error: there is no weights file no.pth"

    @pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
    def test_weights_cannot_be_read(self, refused, pets, name):
        Path(name).write_text("no weights")
        assert refused(pets, f"--model.weights={name}").startswith(f"error: {name} holds no weights that")

    def test_weights_are_another_models(self, refused, pets):
        other = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=48)
        save_file(other.state_dict(), "other.safetensors")
        sentence = refused(pets, "--model.weights=other.safetensors")
        own = len(create_model("deit_tiny_patch16_224", False, 2, {"depth": 1}).state_dict())
        assert sentence.startswith(
            f"error: other.safetensors holds weights of another model than this one of {own} tensors: "
            "1 of another shape (pos_embed is "
        )


class TestWeights:
    def test_of_a_model_with_another_head(self, tmp_path):
        options = {"depth": 1, "img_size": 32}
        source = timm.create_model("deit_tiny_patch16_224", **options)
        save_file(source.state_dict(), tmp_path / "source.safetensors")
        module = train_demo.Classifier(2, weights=str(tmp_path / "source.safetensors"), model_options=options)
        assert torch.equal(module.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
        assert module.model.head.weight.shape == (2, 192)

    def test_of_a_checkpoint_of_an_earlier_run(self, command, pets):
        command(pets, "--trainer.max_epochs=1")
        (checkpoint,) = Path("logs").rglob("*.ckpt")
        trained = torch.load(checkpoint)["state_dict"]
        options = {"depth": 1, "img_size": 32}
        module = train_demo.Classifier(2, weights=str(checkpoint), model_options=options)
        assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())


def test_images_have_the_size_that_the_model_was_given():
    module = train_demo.Classifier(2, model_options={"depth": 1, "img_size": 48})
    assert (
        module.data_config["input_size"]
        == resolve_model_data_config(module.model)["input_size"]
        == (3, 48, 48)
    )
    assert train_demo.Classifier(2, model_options={"depth": 1}).data_config["input_size"] == (3, 224, 224)


def test_real_weights_and_images(assets, command, tmp_path, capsys):
    """Train DeiT-Tiny for one step on two ImageNet classes, as the config says except for the hub."""
    with (assets / "imagenet-val" / "boxes.csv").open() as file:
        classes = {row["image"]: row["class_index"] for row in DictReader(file)}
    frequent = Counter(classes.values()).most_common(2)
    for image, label in classes.items():
        if label in dict(frequent):
            (tmp_path / "real" / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(assets / "imagenet-val" / image, tmp_path / "real" / label)
    command(
        tmp_path / "real",
        f"--model.weights={assets / 'deit_tiny_patch16_224.safetensors'}",
        "--model.model_options={drop_path_rate: 0.1}",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        batch_size="2",
    )
    (folder,) = Path("logs/imagefolder").iterdir()
    events = run_folders.events(folder)
    assert "vitx/maps" in events.Tags()["images"]
    assert {"vitx/rollout/entropy", "vitx/grad_rollout/entropy", "val/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    assert (folder / "after_training.png").is_file()
    assert "val/accuracy" in capsys.readouterr().out
