"""Your own pictures: any folder with a subfolder of images for each class."""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from vitx.errors import VitxError
from vitx.inputs.reading import SUFFIXES, is_picture, read_picture

_VALIDATION_FOLDERS = ("val", "valid", "validation")
_MOST_WORKERS = 8

File = tuple[Path, int]


class FolderImages(Dataset[tuple[Any, int]]):
    """Image files with their classes; samples are (image, class).

    Args:
        files: the path and the class index of each image.
        classes: the names that the indices stand for.
    """

    def __init__(self, files: list[File], classes: tuple[str, ...]) -> None:
        self.files, self.classes = files, classes
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.files[index]
        image = _read(path)
        return (self.transform(image) if self.transform else image), label


class ImageFolderData(pl.LightningDataModule):
    """A folder with a subfolder of images for each class, as for torchvision's ImageFolder.

    If the folder holds `train/` and optionally `val/` and `test/`, the class folders are in these. Without
    `val/`, a part of each class is held out for validation. Images are read in color, rotated as their EXIF
    data says, and preprocessed as the model's own configuration says.

    Args:
        root: the folder; it must be given.
        batch_size: images per step.
        workers: processes that load images; by default one per CPU core, at most 8.
        val_fraction: fraction of each class to validate on if there is no `val/`.
        seed: seed for splitting each class.
        auto_augment: timm's name for the augmentation of training images, or None. With magnitudes above 9,
            timm sometimes posterizes to 0 bits, which Pillow 13 and later refuse.
        random_erasing: probability that a rectangle of a training image is overwritten with noise.
        smallest_crop: smallest area of the random crops of training images, as a fraction of the image.
        horizontal_flip: probability that a training image is mirrored; 0 if left and right matter.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        auto_augment: str | None = "rand-m9-mmax9-mstd0.5-inc1",
        random_erasing: float = 0.25,
        smallest_crop: float = 0.08,
        horizontal_flip: float = 0.5,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser() if root else None
        self.batch_size, self.val_fraction, self.seed = batch_size, val_fraction, seed
        self.workers = min(os.cpu_count() or 1, _MOST_WORKERS) if workers is None else workers
        self.augmentation: dict[str, Any] = {
            "auto_augment": auto_augment,
            "re_prob": random_erasing,
            "re_mode": "pixel",
            "scale": (smallest_crop, 1.0),
            "hflip": horizontal_flip,
        }

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their indices."""
        return self._parts[0].classes

    @cached_property
    def _parts(self) -> tuple[FolderImages, FolderImages, FolderImages | None]:
        """The images to train, validate and test on.

        They are looked up at first use, since an error raised while a command line is instantiated would
        reach the user buried in a message of jsonargparse.
        """
        if self.batch_size < 1:
            raise VitxError(f"batch_size must be at least 1, found {self.batch_size}")
        if not 0 < self.val_fraction < 1:
            raise VitxError(f"val_fraction must lie between 0 and 1, found {self.val_fraction}")
        train, val, test = _find_parts(self.root)
        classes = _class_folders(train, "put the images of each class into a folder named after it")
        if len(classes) == 1:
            raise VitxError(
                f"{train} holds only one class, {classes[0]!r}: add a folder of images for another"
            )
        files = _list_files(train, classes)
        if val:
            val_files = _list_files(val, classes)
        else:
            files, val_files = split_per_class(files, self.val_fraction, self.seed)
        if not val_files:
            raise VitxError(f"{train} holds one image per class and thus none to validate on: add images")
        return (
            FolderImages(files, classes),
            FolderImages(val_files, classes),
            FolderImages(_list_files(test, classes), classes) if test else None,
        )

    def setup(self, stage: str) -> None:
        """Set up the transforms that the model expects."""
        assert self.trainer is not None
        config: Any = self.trainer.lightning_module.data_config
        self.train, self.validation, self.test = self._parts
        self.train.transform = create_transform(**config, is_training=True, **self.augmentation)
        for images in filter(None, (self.validation, self.test)):
            images.transform = create_transform(**config)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return augmented training images in random order."""
        return self._load(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the validation images."""
        return self._load(self.validation)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the images of `test/`."""
        if self.test is None:
            raise VitxError(f"{self.root} holds no test/: add one, or run `validate` instead of `test`")
        return self._load(self.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the images of `test/`, or the validation images if there is no `test/`."""
        return self._load(self.test or self.validation)

    def _load(self, images: FolderImages, shuffle: bool = False) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def split_per_class(files: list[File], fraction: float, seed: int) -> tuple[list[File], list[File]]:
    """Take a fraction of each class, at least one image but never all of them.

    Returns:
        The files that are left and those that were taken, both in their original order.

    Example:
        >>> files = [(Path(f"{name}.jpg"), int(name > "c")) for name in "abcdefgh"]
        >>> left, taken = split_per_class(files, 0.2, seed=0)
        >>> [label for _, label in taken]
        [0, 1]
    """
    generator = Generator().manual_seed(seed)
    taken: set[File] = set()
    for label in sorted({label for _, label in files}):
        members = [file for file in files if file[1] == label]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        taken |= {members[place] for place in torch.randperm(len(members), generator=generator)[:count]}
    return [file for file in files if file not in taken], [file for file in files if file in taken]


def _read(path: Path) -> Image.Image:
    """Read an image as `vitx explain` does, so that a model is trained on the same pixels."""
    try:
        return read_picture(path)
    except VitxError as error:
        raise VitxError(f"{error}; replace or remove it") from error


def _find_parts(root: Path | None) -> tuple[Path, Path | None, Path | None]:
    """Return the folders that hold the class folders for training, validation and test."""
    if root is None:
        raise VitxError("no folder of images was given: give one with --data.root FOLDER")
    if not root.is_dir():
        raise VitxError(f"there is no folder {root}: give one that holds a folder of images for each class")
    val = next((root / name for name in _VALIDATION_FOLDERS if (root / name).is_dir()), None)
    train, test = root / "train", root / "test"
    if train.is_dir():
        return train, val, test if test.is_dir() else None
    if val:
        raise VitxError(
            f"{root} holds {val.name}/ but no train/: add it, with a folder of images for each class"
        )
    return root, None, None


def _list_files(folder: Path, classes: tuple[str, ...]) -> list[File]:
    """Return the images of a folder, class by class; hidden files are left out."""
    found = _class_folders(folder, "give it the same ones as the training images have")
    if unknown := [name for name in found if name not in classes]:
        raise VitxError(
            f"{folder} holds the class {unknown[0]!r}, which has no training images: add some, or remove it"
        )
    files = []
    for name in found:
        images = [path for path in sorted((folder / name).rglob("*")) if is_picture(path)]
        if not images:
            raise VitxError(
                f"the class {name!r} has no images in {folder}: add some ({', '.join(sorted(SUFFIXES))}), "
                "or remove its folder"
            )
        files += [(path, classes.index(name)) for path in images]
    return files


def _class_folders(folder: Path, hint: str) -> tuple[str, ...]:
    names = sorted(item.name for item in folder.iterdir() if item.is_dir() and item.name[0] != ".")
    if not names:
        raise VitxError(f"{folder} holds no class folders: {hint}")
    return tuple(names)
