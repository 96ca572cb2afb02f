"""A folder of the user's own images: its contents, how they are prepared, and its errors."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from demo.folder import FolderImages, ImageFolderData
from tests.class_folders import write_classes, write_image
from vitx import VitxError
from vitx.inputs.reading import read_picture
from vitx.watch.data_sets import class_names

SETTINGS = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}


def prepared(root, settings=SETTINGS, **options):
    """Set up the data as a trainer would."""
    data = ImageFolderData(str(root), workers=options.pop("workers", 0), **options)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(data_config=settings))
    data.setup("fit")
    return data


def names(images):
    return [str(Path(*path.parts[-2:])) for path, _ in images.files]


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
        assert data.validation.files[0][1] == 1  # the class of `dog` in training
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
        image = Image.new("RGBA", (8, 12), (255, 0, 0, 0))  # transparent, read as white
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
        color = torch.tensor(np.asarray(read_picture(data.validation.files[0][0]))[0, 0] / 255).float()
        assert image.shape == (3, 32, 32)
        torch.testing.assert_close(image.mean((1, 2)), (color - 0.5) / 0.25, atol=0.1, rtol=0)
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


def test_the_callback_finds_class_names(pets):
    images = prepared(pets).validation
    assert class_names(images) == class_names(Subset(images, [0])) == ("cat", "dog")
