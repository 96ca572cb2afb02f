"""A folder of one's own images: what is found in it, how it is prepared, what is wrong with it."""

import shutil
import sys
from collections import Counter
from csv import DictReader
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data.config import resolve_model_data_config
from timm.models._hub import has_hf_hub
from torch.utils.data import Subset

import train_demo
from demo.folder import FolderImages, ImageFolderData
from vitx import VitxError
from vitx.callbacks.labels import class_names
from vitx.checkpoints import create_model
from vitx.pictures import read_picture

CONFIG = Path(train_demo.__file__).parent / "configs" / "deit_tiny_imagefolder.yaml"
SETTINGS = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
TINY = {
    "--model.pretrained": "false",
    "--model.model_options.img_size": "32",
    "--model.model_options.depth": "1",
    "--trainer.accelerator": "cpu",
    "--trainer.enable_model_summary": "false",
    "--data.workers": "0",
}


def write_image(path, colour=(200, 100, 50), size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_classes(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_image(folder / name / f"{number}.jpg", colour=(20 * number, 100, 50))
    return folder


def prepared(root, settings=SETTINGS, **options):
    """The data as a trainer would have set it up."""
    data = ImageFolderData(str(root), workers=options.pop("workers", 0), **options)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(data_config=settings))
    data.setup("fit")
    return data


def names(images):
    return [str(Path(*path.parts[-2:])) for path, _ in images.files]


@pytest.fixture
def pets(tmp_path):
    return write_classes(tmp_path / "pets", cat=5, dog=10)


class TestPlainFolder:
    def test_knows_its_classes_before_it_is_set_up(self, pets):
        data = ImageFolderData(str(pets))
        assert data.num_classes == 2
        assert data.classes == ("cat", "dog")

    def test_is_split_per_class(self, pets):
        data = prepared(pets)
        assert Counter(label for _, label in data.validation.files) == {0: 1, 1: 2}
        assert Counter(label for _, label in data.train.files) == {0: 4, 1: 8}
        assert not set(names(data.train)) & set(names(data.validation))

    def test_is_split_by_the_seed_alone(self, pets, tmp_path):
        moved = shutil.copytree(pets, tmp_path / "moved")
        splits = [
            names(prepared(root, seed=seed).validation) for root, seed in [(pets, 1), (moved, 1), (pets, 2)]
        ]
        assert splits[0] == splits[1] != splits[2]

    @pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
    def test_every_class_keeps_an_image_to_train_on(self, tmp_path, fraction):
        root = write_classes(tmp_path, one=1, two=2, many=7)
        data = prepared(root, val_fraction=fraction)
        assert {label for _, label in data.train.files} == {0, 1, 2}
        assert {data.classes[label] for _, label in data.validation.files} == {"two", "many"}

    def test_finds_images_below_and_passes_over_hidden_ones(self, tmp_path):
        root = write_classes(tmp_path, a=2, b=2, **{".cache": 1})
        write_image(root / "a" / "deep" / "SCAN.JPEG")
        write_image(root / "a" / "._0.jpg")
        (root / "a" / "notes.txt").touch()
        data = prepared(root)
        assert data.classes == ("a", "b")
        assert sorted(names(data.train) + names(data.validation)) == [
            "a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg", "deep/SCAN.JPEG",
        ]  # fmt: skip


class TestSplitFolder:
    @pytest.mark.parametrize("val", ["val", "valid", "validation"])
    def test_is_used_as_it_is(self, tmp_path, val):
        write_classes(tmp_path / "train", cat=2, dog=3)
        write_classes(tmp_path / val, dog=1)
        data = prepared(tmp_path)
        assert names(data.validation) == ["dog/0.jpg"]
        assert data.validation.files[0][1] == 1  # the class that `dog` is in training
        assert len(data.train) == 5
        assert len(data.predict_dataloader().dataset) == 1
        with pytest.raises(VitxError, match=r"no test/"):
            data.test_dataloader()

    def test_may_hold_images_to_test_on(self, tmp_path):
        for part, count in {"train": 3, "val": 2, "test": 1}.items():
            write_classes(tmp_path / part, cat=count, dog=count)
        data = prepared(tmp_path)
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        assert [len(loader.dataset) for loader in loaders] == [6, 4, 2]
        assert data.predict_dataloader().dataset is data.test

    def test_without_val_is_split_per_class(self, tmp_path):
        write_classes(tmp_path / "train", cat=5, dog=5)
        write_classes(tmp_path / "test", cat=1, dog=1)
        data = prepared(tmp_path)
        assert [len(images) for images in (data.train, data.validation, data.test)] == [8, 2, 2]


def a_file(root):
    root.touch()


def only_images(root):
    write_image(root / "0.jpg")


def an_empty_class(root):
    write_classes(root, cat=2, dog=0, owl=2)


def a_class_of_other_files(root):
    write_classes(root, cat=2, dog=0)
    (root / "dog" / "0.txt").touch()


def val_knows_more(root):
    write_classes(root / "train", cat=2, dog=2)
    write_classes(root / "val", cat=1, dog=1, owl=1)


def val_has_an_empty_class(root):
    write_classes(root / "train", cat=2, dog=2)
    write_classes(root / "val", cat=1, dog=0)


def val_is_empty(root):
    write_classes(root / "train", cat=2, dog=2)
    (root / "val").mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, r"there is no folder .*data: give"),
        (a_file, r"there is no folder .*data: give"),
        (only_images, r"data holds no class folders: put"),
        (lambda root: write_classes(root, cat=3), r"data holds only one class, 'cat': add"),
        (an_empty_class, r"the class 'dog' has no images in .*data: add"),
        (a_class_of_other_files, r"the class 'dog' has no images"),
        (val_knows_more, r"val holds the class 'owl', which has no training images: add"),
        (val_has_an_empty_class, r"the class 'dog' has no images in .*val: add"),
        (val_is_empty, r"val holds no class folders: give"),
        (lambda root: write_classes(root / "val", cat=1, dog=1), r"holds val/ but no train/: add"),
        (lambda root: write_classes(root, cat=1, dog=1), r"one image per class .*: add"),
    ],
)
def test_says_what_is_wrong_with_a_folder(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(VitxError, match=message) as caught:
        ImageFolderData(str(tmp_path / "data")).num_classes  # noqa: B018
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"val_fraction": 1.0}, {"val_fraction": 0.0}, {"batch_size": 0}])
def test_says_what_is_wrong_with_an_option(pets, options):
    with pytest.raises(
        VitxError, match=rf"{next(iter(options))} must .* found {next(iter(options.values()))}"
    ):
        prepared(pets, **options)


class TestImage:
    def test_is_as_vitx_explain_reads_it(self, tmp_path):
        image = Image.new("RGBA", (8, 12), (255, 0, 0, 0))  # see-through: white
        exif = image.getexif()
        exif[0x0112] = 6  # the camera was held on its side
        image.save(tmp_path / "image.png", exif=exif)
        found, label = FolderImages([(tmp_path / "image.png", 1)], ("cat", "dog"))[0]
        assert (found.mode, found.size, found.getpixel((0, 0)), label) == ("RGB", (12, 8), (255,) * 3, 1)

    @pytest.mark.parametrize(("kind", "workers"), [("text", 0), ("empty", 0), ("truncated", 0), ("text", 1)])
    def test_names_a_broken_file(self, tmp_path, kind, workers):
        root = write_classes(tmp_path, cat=2, dog=2)
        for path in sorted(root.rglob("*.jpg")):
            whole = path.read_bytes()
            path.write_bytes({"text": b"no image", "empty": b"", "truncated": whole[: len(whole) - 20]}[kind])
        with pytest.raises(VitxError, match=r"\d\.jpg (is no|could not be read).*; replace or remove it"):
            next(iter(prepared(root, workers=workers).val_dataloader()))


class TestTransforms:
    def test_evaluation_is_as_the_model_wants_it(self, pets):
        data = prepared(pets)
        image, _ = data.validation[0]
        colour = torch.tensor(np.asarray(read_picture(data.validation.files[0][0]))[0, 0] / 255).float()
        assert image.shape == (3, 32, 32)
        torch.testing.assert_close(image.mean((1, 2)), (colour - 0.5) / 0.25, atol=0.1, rtol=0)
        assert torch.equal(image, data.validation[0][0])

    def test_training_images_are_augmented(self, pets):
        data = prepared(pets)
        assert data.train[0][0].shape == (3, 32, 32)
        assert not torch.equal(data.train[0][0], data.train[0][0])
        shown = str(data.train.transform)
        assert "RandAugment" in shown
        assert "scale=(0.08, 1.0)" in shown

    def test_augmentation_can_be_turned_down(self, pets):
        options = {"auto_augment": None, "random_erasing": 0.0, "horizontal_flip": 0.0, "smallest_crop": 0.5}
        shown = str(prepared(pets, **options).train.transform)
        assert "scale=(0.5, 1.0)" in shown
        assert not any(word in shown for word in ("RandAugment", "RandomErasing", "Flip"))


def test_loaders(pets):
    data = prepared(pets, batch_size=4)
    train, val = data.train_dataloader(), data.val_dataloader()
    images, labels = next(iter(val))
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [0, 1, 1]
    assert len(train) == 3  # the last, smaller batch counts
    assert isinstance(train.sampler, torch.utils.data.RandomSampler)
    assert isinstance(val.sampler, torch.utils.data.SequentialSampler)
    assert prepared(pets, workers=1).train_dataloader().persistent_workers
    assert train.pin_memory is torch.cuda.is_available()


def test_the_callback_findsclass_names(pets):
    images = prepared(pets).validation
    assert class_names(images) == class_names(Subset(images, [0])) == ("cat", "dog")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `python train_demo.py` with the config, small, in a folder of its own."""
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
    """Runs the command line, which must end with one sentence; returns it."""

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
        assert sentence.endswith(".jpg is no image file that can be read; replace or remove it")

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
        assert sentence.startswith("error: timm has no model 'deit_teeny_patch16_224'; some near it: deit")

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
            "error: other.safetensors holds weights of another model: "
            f"of this one's {own} tensors 0 are missing and 1 have another shape, and 12 are not known to it"
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
    """One step of DeiT-Tiny on two of ImageNet's classes, as the config says but for the hub."""
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
    events = EventAccumulator(str(folder)).Reload()
    assert "vitx/maps" in events.Tags()["images"]
    assert {"vitx/rollout/entropy", "vitx/grad_rollout/entropy", "val/accuracy"} <= set(
        events.Tags()["scalars"]
    )
    assert (folder / "after_training.png").is_file()
    assert "val/accuracy" in capsys.readouterr().out
