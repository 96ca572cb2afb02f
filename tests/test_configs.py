"""Every file in configs/ trains from the real command line, with a tiny model on a few stand-in pictures."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from timm.data.auto_augment import rand_augment_transform

import train_demo
from demo import digits, pretrain
from demo.pets import PetData
from demo.tuning import LinearProbe, add_lora
from tests import run_folders
from train_demo import CONFIGS
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.models.checkpoints import create_model

# Two steps instead of `fast_dev_run`, which skips the logger and the checkpoint that is loaded at the end.
SHORT = [
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_model_summary=false",
    "--data.batch_size=4",
]
LOADING = ["--data.workers=0"]
FOLDER = [*LOADING, "--data.root=folder"]
PETS = [*LOADING, "--data.root=.", "--data.download=false"]

# The configs under each one that is not an experiment of its own, and the options for the stand-in data.
TRAINED = {
    "demo": ([], []),
    "shortcut": (["demo"], []),
    "deit_tiny_imagefolder": ([], FOLDER),
    "pets": ([], PETS),
    "distilled": (["pets"], PETS),
    "deit3": (["pets"], PETS),
    "linear_probe": (["pets"], PETS),
    "lora": (["pets"], PETS),
}
ELSEWHERE = {"ddp", "pretrain"}  # have tests of their own below


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {*TRAINED, *ELSEWHERE}


def tiny_model(name, pretrained, num_classes, options=None):
    """Build a model of the same kind without weights, with one layer unless the config says otherwise."""
    return create_model(name, False, num_classes, {"depth": 1, "img_size": 32} | (options or {}))


def write_folder(root):
    for kind in ("cat", "dog"):
        (root / kind).mkdir(parents=True)
        for number in range(4):
            Image.effect_noise((40, 30), 50).convert("RGB").save(root / kind / f"{number}.jpg")


def write_pets(root, size=(40, 30)):
    """Write three pictures of each breed as torchvision expects them on disk; animals are bright ellipses."""
    images, annotations = root / "oxford-iiit-pet" / "images", root / "oxford-iiit-pet" / "annotations"
    images.mkdir(parents=True)
    (annotations / "trimaps").mkdir(parents=True)
    for split, numbers in {"trainval": (1, 2), "test": (3,)}.items():
        lines = []
        for breed in range(37):
            for number in numbers:
                name = f"breed_{breed:02}_{number}"
                lines.append(f"{name} {breed + 1} {1 + breed % 2} 1")
                picture, trimap = draw_pet(size, place=breed / 36)
                picture.save(images / f"{name}.jpg", quality=95)
                trimap.save(annotations / "trimaps" / f"{name}.png")
        (annotations / f"{split}.txt").write_text("\n".join(lines) + "\n")


def draw_pet(size, place):
    """Draw a white ellipse and its trimap, from the left of the picture (place 0) to the right (place 1)."""
    width, height = size
    left, top = place * width / 2, height / 4
    box = (left, top, left + width / 2, top + height / 2)
    picture, trimap = Image.new("RGB", size, (20, 60, 20)), Image.new("L", size, 2)
    ImageDraw.Draw(picture).ellipse(box, fill="white")
    ImageDraw.Draw(trimap).ellipse(box, fill=1, outline=3, width=max(1, width // 40))
    return picture, trimap


FIT = {"fit": train_demo.DemoCLI.subcommands()["fit"]}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_demo.py"])
    monkeypatch.setattr(train_demo, "create_model", tiny_model)
    monkeypatch.setattr(train_demo.DemoCLI, "subcommands", lambda *_: FIT)  # others take longer to parse
    monkeypatch.setattr(digits, "SPLIT_SIZES", (4984, 8, 8))  # few images to explain


def configs(*names):
    return [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


def run(*names, words=()):
    train_demo.main([*configs(*names), *SHORT, *words])


def logged(name):
    (folder,) = Path("logs", name).iterdir()
    assert (folder / "after_training.png").is_file()
    return run_folders.events(folder)


@pytest.mark.parametrize("name", TRAINED)
def test_trains_and_shows_what_it_looks_at(name):
    below, words = TRAINED[name]
    (write_pets if words is PETS else write_folder)(Path() if words is PETS else Path("folder"))
    run(*below, name, words=words)
    events = logged(name.removeprefix("deit_tiny_"))
    assert [event.step for event in events.Images("vitx/maps")] == [0, 1]
    scalars = set(events.Tags()["scalars"])
    assert "vitx/grad_rollout/entropy" in scalars
    assert "val/accuracy" in scalars
    assert ("val_clean/accuracy" in scalars) == (name == "shortcut")
    if words is PETS:
        assert {"vitx/rollout/pointing", "vitx/evidence/energy"} <= scalars
    if name == "linear_probe":  # under which attention stands still
        rollout, evidence = (events.Scalars(f"vitx/{one}/drift")[-1].value for one in ("rollout", "evidence"))
        assert rollout == pytest.approx(0, abs=1e-6)
        assert evidence > 1e-6


def test_a_linear_probe_trains_the_head_alone():
    module = train_demo.Classifier(3, "deit_tiny_distilled_patch16_224", pretrained=True)
    LinearProbe().setup(None, module, "fit")
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained == {
        f"model.{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")
    }
    assert not module.model.blocks.training
    assert module.model.head.training
    assert sum(len(group["params"]) for group in optimizer_of(module).param_groups) == 4


def test_lora_trains_its_changes_and_the_head():
    options = yaml.safe_load((CONFIGS / "lora.yaml").read_text())["model"]["lora"]
    module = train_demo.Classifier(3, pretrained=True, lora=options)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    changes = [f"attn.{layer}.lora_{side}.default.weight" for layer in ("qkv", "proj") for side in "AB"]
    assert trained == {
        *(f"model.blocks.0.{name}" for name in changes),
        "model.head.weight",
        "model.head.bias",
    }
    assert sum(len(group["params"]) for group in optimizer_of(module).param_groups) == 6


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(VitxError, match=r'^LoRA needs peft: pip install -e "\.\[lora\]"$'):
        add_lora(tiny_model("deit_tiny_patch16_224", False, 2), {"target_modules": ["attn.qkv"]})


@pytest.mark.parametrize("options", [{"rank": 8}, {"target_modules": ["nowhere"]}])
def test_lora_with_options_that_peft_does_not_take(options):
    with pytest.raises(VitxError, match=r"^peft does not take these options of LoRA: "):
        add_lora(tiny_model("deit_tiny_patch16_224", False, 2), options)


@pytest.mark.parametrize("name", ["deit_tiny_imagefolder", "pets"])
def test_the_strongest_augmentation_is_one_that_pillow_does(name, monkeypatch):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    augmentation = rand_augment_transform(config["data"]["init_args"]["auto_augment"], {})
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: mean + 9 * deviation)
    for operation in augmentation.ops:
        operation.prob = 1
        assert operation(Image.new("RGB", (8, 8))).size == (8, 8)


def optimizer_of(module):
    module.trainer = SimpleNamespace(estimated_stepping_batches=10)
    (optimizer,), _ = module.configure_optimizers()
    return optimizer


def prepared(size=(40, 30), **settings):
    """Set up the pets as a trainer would."""
    write_pets(Path(), size)
    data = PetData(".", download=False, workers=0, batch_size=5)
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(data_config=config | settings))
    data.setup("fit")
    return data


class TestPets:
    def test_parts(self):
        data = prepared()
        assert (len(data.train), len(data.validation), len(data.test)) == (59, 15, 37)
        assert not set(data.train.places) & set(data.validation.places)
        assert data.classes[1] == "Breed 01"
        assert len(data.train[0]) == 2
        images, labels, masks = next(iter(data.val_dataloader()))
        assert images.shape == (5, 3, 32, 32)
        assert masks.shape == (5, 32, 32)
        assert masks.dtype == torch.bool
        assert labels.tolist() == sorted(labels.tolist())

    @pytest.mark.parametrize("size", [(80, 60), (60, 100)])
    @pytest.mark.parametrize("crop", [("center", 0.9), ("center", 1.0), ("squash", 0.9), ("border", 0.9)])
    def test_masks_lie_where_the_animal_does(self, size, crop):
        data = prepared(size, crop_mode=crop[0], crop_pct=crop[1])
        for image, label, mask in data.test:
            bright = image[0] > 1  # the white animal is 2 after normalization; padding may be 0
            union = (bright | mask).sum()
            assert (bright & mask).sum() > 0.85 * union, f"breed {label}"
        assert torch.equal(data.test[0][0], data.test[0][0])

    def test_the_border_counts_as_pet(self):
        data = prepared()
        trimap = np.asarray(data.test.pets[18][1][1])
        assert set(np.unique(trimap)) == {1, 2, 3}
        data.test.mask_transform = lambda image: torch.as_tensor(np.array(image))[None]
        assert np.array_equal(data.test[18][2], trimap != 2)

    @pytest.mark.parametrize("download", ["true", "false"])
    def test_are_not_there(self, download, monkeypatch, capsys):
        def unreachable(*args, **options):
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", unreachable)
        with pytest.raises(SystemExit):
            run("pets", words=[f"--data.download={download}"])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: the pets in data/oxford-iiit-pet are missing or incomplete")
        assert ("could not be fetched" in said) == (download == "true")

    def test_a_picture_is_missing(self):
        data = prepared()
        for path in Path("oxford-iiit-pet").rglob("breed_00_*.png"):
            path.unlink()
        with pytest.raises(VitxError, match=r"^a file of the pets is missing or broken"):
            data.test[0]

    def test_are_there_in_part(self):
        Path("oxford-iiit-pet/images").mkdir(parents=True)
        Path("oxford-iiit-pet/annotations").mkdir()
        with pytest.raises(VitxError, match="missing or incomplete"):
            PetData(".").prepare_data()


def test_ddp_has_two_processes():
    """Built, not trained: two processes take most of a minute to start; tests/test_group.py trains two."""
    cli = train_demo.DemoCLI(
        train_demo.Classifier,
        pl.LightningDataModule,
        subclass_mode_data=True,
        run=False,
        args=[*configs("demo", "ddp"), *SHORT[:1]],
    )
    assert isinstance(cli.trainer.strategy, DDPStrategy)
    assert cli.trainer.world_size == 2
    assert any(isinstance(callback, RolloutCallback) for callback in cli.trainer.callbacks)
    assert isinstance(cli.datamodule, digits.DigitScenes)
    assert cli.datamodule.batch_size * 2 == 32


def test_pretraining_writes_weights_that_the_demo_loads(monkeypatch):
    short = [
        "--trainer.max_steps=1",
        "--trainer.callbacks=null",
        "--model.batch_size=2",
        "--model.warmup_steps=1",
    ]
    monkeypatch.setattr(pretrain, "BANK", 64)
    monkeypatch.setattr(sys, "argv", ["pretrain", *short, "--model.output=weights.safetensors"])
    pretrain.main()
    options = {"img_size": 64, "patch_size": 8, "depth": 4}
    module = train_demo.Classifier(10, weights="weights.safetensors", model_options=options)
    loaded, written = module.model.state_dict(), load_file("weights.safetensors")
    assert len(written) == len(loaded) - 2, "all but the head"
    assert all(torch.equal(loaded[name], value.float()) for name, value in written.items())


@pytest.mark.parametrize("name", [*(name for name, (below, _) in TRAINED.items() if below), "ddp"])
def test_one_that_is_put_over_another_says_so_when_alone(name, capsys):
    with pytest.raises(SystemExit):
        run(name)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: the config has settings of a class that it does not name: put it over one")
