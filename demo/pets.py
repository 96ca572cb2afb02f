"""Oxford-IIIT Pet: 37 breeds of cats and dogs, and where in the picture the animal is."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.datasets import OxfordIIITPet

from demo.folder import ImageFolderData
from vitx.errors import VitxError

_BACKGROUND = 2  # in a trimap, beside 1 for the pet and 3 for its border


class PetImages(Dataset[tuple[Any, ...]]):
    """Some of torchvision's pets; samples are (image, class), and with `mask_transform` (image, class, mask).

    Args:
        pets: samples are (image, (class, trimap)).
        places: which of them.
    """

    def __init__(self, pets: Any, places: Sequence[int]) -> None:
        self.pets, self.places = pets, places
        self.classes = tuple(pets.classes)
        self.transform: Callable[[Image.Image], Any] | None = None
        self.mask_transform: Callable[[Image.Image], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        try:
            image, (label, trimap) = self.pets[self.places[index]]
        except OSError as error:
            raise VitxError(
                f"the pets hold a file that is missing or broken, unpack them again: {error}"
            ) from error
        image = self.transform(image) if self.transform else image
        if self.mask_transform is None:
            return image, label
        return image, label, object_mask(self.mask_transform(trimap))


class PetData(ImageFolderData):
    """The pets of torchvision's `OxfordIIITPet`, prepared as the model's own configuration says.

    A part of the images to train on, drawn at random, is kept to validate on; those to test on are Oxford's.
    Images to validate and test on come with a mask of the animal, which goes through the same resizing and
    cropping. Training images come without one: what is watched is the validation set.

    Args:
        root: where the folder `oxford-iiit-pet` is, or is put.
        download: fetch the images (about 800 MB) where they are missing.
        options: as of `ImageFolderData`.
    """

    num_classes = 37

    def __init__(self, root: str = "data", download: bool = True, **options: Any) -> None:
        super().__init__(root, **options)
        self.download = download

    def prepare_data(self) -> None:
        """Fetch the images, in one process of each machine."""
        self._open("trainval", self.download)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        pets, generator = self._open("trainval"), Generator().manual_seed(self.seed)
        mixed = torch.randperm(len(pets), generator=generator)
        kept = max(round(self.val_fraction * len(pets)), 1)
        test = self._open("test")
        # In their old order, which is that of the breeds: evenly spaced images are of different ones.
        return (
            PetImages(pets, sorted(mixed[kept:].tolist())),
            PetImages(pets, sorted(mixed[:kept].tolist())),
            PetImages(test, range(len(test))),
        )

    def setup(self, stage: str) -> None:
        """Prepare images as the model wants them, and masks as the images."""
        super().setup(stage)
        assert self.trainer is not None
        config: Any = self.trainer.lightning_module.data_config
        # A trimap's values are names: they are neither mixed nor normalised. What is padded is filled with
        # the mean, here with background.
        for_trimaps = {**config, "interpolation": "nearest", "mean": (_BACKGROUND / 255,)}
        _, *watched = self._parts
        for images in watched:
            images.mask_transform = create_transform(**for_trimaps, normalize=False)

    def _open(self, split: str, download: bool = False) -> Any:
        kinds = ["category", "segmentation"]
        try:
            return OxfordIIITPet(self.root, split, target_types=kinds, download=download)
        except (OSError, RuntimeError) as error:  # the network, the disk, a broken archive, nothing there
            raise VitxError(
                f"the pets are not, or not completely, in {self.root}/oxford-iiit-pet"
                f"{' and could not be fetched' if download else ''}: unpack images.tar.gz and "
                f"annotations.tar.gz of www.robots.ox.ac.uk/~vgg/data/pets there ({_first_line(error)})"
            ) from error


def object_mask(trimap: Tensor) -> Tensor:
    """Return where the pet is, (h, w) bool, from a trimap (1, h, w).

    The border counts as pet. It is a band about the outline that holds fur, ears and tails, at times nothing
    but the band; a map that points at an ear points at the animal. What background the band holds besides is
    granted to all maps alike.

    Example:
        >>> object_mask(torch.tensor([[[1, 2, 3]]]))
        tensor([[ True, False,  True]])
    """
    return trimap[0] != _BACKGROUND


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
