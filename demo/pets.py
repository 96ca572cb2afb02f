"""Oxford-IIIT Pet: 37 breeds of cats and dogs, with masks of the animals."""

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
from vitx.errors import VitxError, in_words

_BACKGROUND = 2  # in a trimap, where 1 is the pet and 3 its border


class PetImages(Dataset[tuple[Any, ...]]):
    """Some of torchvision's pets; samples are (image, class), or (image, class, mask) with `mask_transform`.

    Args:
        pets: a data set of samples (image, (class, trimap)).
        places: indices of the samples to use.
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
            raise VitxError(f"a file of the pets is missing or broken; unpack them again: {error}") from error
        image = self.transform(image) if self.transform else image
        if self.mask_transform is None:
            return image, label
        return image, label, object_mask(self.mask_transform(trimap))


class PetData(ImageFolderData):
    """The pets of torchvision's `OxfordIIITPet`, preprocessed as the model's own configuration says.

    A random part of the training images is held out for validation; the test images are Oxford's. Validation
    and test images come with a mask of the animal, which is resized and cropped in the same way. Training
    images come without one, since only the validation set is watched.

    Args:
        root: the folder that holds the folder `oxford-iiit-pet`, or that it is downloaded to.
        download: download the images (about 800 MB) if they are missing.
        options: options of `ImageFolderData`.
    """

    num_classes = 37

    def __init__(self, root: str = "data", download: bool = True, **options: Any) -> None:
        super().__init__(root, **options)
        self.download = download

    def prepare_data(self) -> None:
        """Download the images, in one process per machine."""
        self._open("trainval", self.download)

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        pets, generator = self._open("trainval"), Generator().manual_seed(self.seed)
        mixed = torch.randperm(len(pets), generator=generator)
        kept = max(round(self.val_fraction * len(pets)), 1)
        test = self._open("test")
        # In their original order, which is by breed, so that evenly spaced images are of different breeds.
        return (
            PetImages(pets, sorted(mixed[kept:].tolist())),
            PetImages(pets, sorted(mixed[:kept].tolist())),
            PetImages(test, range(len(test))),
        )

    def setup(self, stage: str) -> None:
        """Set up the transforms that the model expects, and those of the masks to match."""
        super().setup(stage)
        assert self.trainer is not None
        config: Any = self.trainer.lightning_module.data_config
        # The values of a trimap are categories, which are neither interpolated nor normalized. Padding is
        # filled with the mean, which is background here.
        for_trimaps = {**config, "interpolation": "nearest", "mean": (_BACKGROUND / 255,)}
        _, *watched = self._parts
        for images in watched:
            images.mask_transform = create_transform(**for_trimaps, normalize=False)

    def _open(self, split: str, download: bool = False) -> Any:
        kinds = ["category", "segmentation"]
        try:
            return OxfordIIITPet(self.root, split, target_types=kinds, download=download)
        except (OSError, RuntimeError) as error:  # network, disk, a broken archive, or no data
            raise VitxError(
                f"the pets in {self.root}/oxford-iiit-pet are missing or incomplete"
                f"{', and could not be fetched' if download else ''}: unpack images.tar.gz and "
                f"annotations.tar.gz of www.robots.ox.ac.uk/~vgg/data/pets there ({in_words(error)})"
            ) from error


def object_mask(trimap: Tensor) -> Tensor:
    """Return where the pet is, (h, w) bool, from a trimap (1, h, w).

    The border counts as pet. It is a band along the outline that holds fur, ears and tails; some trimaps hold
    nothing but the band. A map that points at an ear points at the animal, and background inside the band
    favors all maps alike.

    Example:
        >>> object_mask(torch.tensor([[[1, 2, 3]]]))
        tensor([[ True, False,  True]])
    """
    return trimap[0] != _BACKGROUND
