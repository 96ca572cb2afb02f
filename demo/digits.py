"""The demo's data: handwritten digits to classify, hidden among fragments of other digits."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from demo.glyphs import digits
from demo.marks import MARKS
from demo.scenes import cut_fragments, draw_scenes
from vitx.errors import VitxError

SPLIT_SIZES = (4000, 500, 500)  # digits for training, validation and test, without overlap
_FRAGMENT_BANK = 8192
_MEAN = _STD = 0.5  # as the shipped weights expect


class DigitScenes(pl.LightningDataModule):
    """Handwritten digits pasted at random places and scales into clutter, 64 x 64 pixels.

    Samples are (image, digit, mask), where the mask is True in the digit's box. Training scenes are drawn
    anew in every epoch; validation and test scenes are always the same.

    Args:
        batch_size: scenes per step.
        mark: a shortcut to plant in every picture, one of `demo.marks.MARKS`: "corner" is a small printed
            letter that reveals the digit. A second validation set without marks then shows what the model
            has learned about digits.
        seed: seed for splitting the digits and drawing the fixed scenes.
    """

    num_classes = 10

    def __init__(self, batch_size: int = 64, mark: str | None = None, seed: int = 0) -> None:
        super().__init__()
        if mark not in (None, *MARKS):
            raise VitxError(f"there is no mark {mark!r}: the marks are {', '.join(MARKS)}")
        self.batch_size, self.mark, self.seed = batch_size, mark, seed

    def setup(self, stage: str) -> None:
        """Split the digits, and draw the fixed scenes."""
        glyphs, classes = digits()
        generator = Generator().manual_seed(self.seed)
        sets = [(glyphs[part], classes[part]) for part in split_digits(len(glyphs), generator)]
        training = sets[0][0]
        bank = training[torch.randint(len(training), (_FRAGMENT_BANK,), generator=generator)]
        fragments = cut_fragments(bank, generator)
        self.train = TrainingScenes(*sets[0], fragments, self.mark)
        clean = [_fixed_scenes(*part, fragments, generator) for part in sets[1:]]
        # The watched set comes first; the clean scenes are evaluated in addition to the marked ones.
        self.validation, self.test = (
            [_mark_all(scenes, self.mark, generator), scenes] if self.mark else [scenes] for scenes in clean
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training scenes in random order."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Return the validation scenes and, if they are marked, the same scenes without marks."""
        return [DataLoader(scenes, batch_size=self.batch_size) for scenes in self.validation]

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Return the test scenes, on which no choice was based, in the same form as `val_dataloader`."""
        return [DataLoader(scenes, batch_size=self.batch_size) for scenes in self.test]

    def predict_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """Return the test scenes."""
        return self.test_dataloader()


class TrainingScenes(Dataset[tuple[Tensor, ...]]):
    """One new scene for each digit in every epoch, drawn from torch's global generator."""

    def __init__(self, glyphs: Tensor, classes: Tensor, fragments: Tensor, mark: str | None) -> None:
        self.glyphs, self.classes, self.fragments, self.mark = glyphs, classes, fragments, mark

    def __len__(self) -> int:
        return len(self.glyphs)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Draw a batch at once, which is many times faster than scene by scene."""
        picked = torch.as_tensor(indices)
        scenes = draw_scenes(self.glyphs[picked, None], self.fragments)
        images, classes, boxes = scenes.images, self.classes[picked], scenes.boxes()
        if self.mark:
            images, _ = MARKS[self.mark](images, classes, boxes, None)
        return list(zip(normalized(images), classes, boxes, strict=True))


def split_digits(count: int, generator: Generator) -> tuple[Tensor, ...]:
    """Split the indices of `count` digits at random into training, validation and test."""
    return tuple(torch.randperm(count, generator=generator).split(list(SPLIT_SIZES)))


def _fixed_scenes(glyphs: Tensor, classes: Tensor, fragments: Tensor, generator: Generator) -> TensorDataset:
    scenes = draw_scenes(glyphs[:, None], fragments, generator)
    return TensorDataset(normalized(scenes.images), classes, scenes.boxes())


def _mark_all(scenes: TensorDataset, mark: str, generator: Generator) -> TensorDataset:
    images, classes, boxes = scenes.tensors
    marked, _ = MARKS[mark](unnormalized(images), classes, boxes, generator)
    return TensorDataset(normalized(marked), classes, boxes)


def normalized(images: Tensor) -> Tensor:
    """Normalize images in [0, 1] as the shipped weights expect."""
    return (images - _MEAN) / _STD


def unnormalized(images: Tensor) -> Tensor:
    """Map normalized images back to [0, 1]."""
    return images * _STD + _MEAN
