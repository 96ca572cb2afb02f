"""Volumes: read from files, and prepared for a model that takes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.inputs.preprocessing import Preprocessing
from vitx.inputs.reading import ARRAYS, check_size, has_suffix, load_array, needs, readable

VOLUMES = frozenset((".nii", ".nii.gz"))
MOST_VOXELS = 1_000_000_000  # ten times as many as a picture's: scans have them


@dataclass(frozen=True)
class VolumePreprocessing(Preprocessing):
    """The preprocessing of volumes: of one channel, resampled, and normalised."""

    depth: int = 0  # the first of the three sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of a volume, (1, D, H, W)."""
        return (1, self.depth, *self.size)

    @property
    def suffixes(self) -> frozenset[str]:
        """Return those of the files that it can read."""
        return VOLUMES | ARRAYS

    def read(self, path: Path, most_pixels: int | None = None) -> NDArray[np.float32]:
        """Read a volume, see `read_volume`."""
        return read_volume(path, most_pixels or MOST_VOXELS)

    def __call__(self, volume: Any) -> Tensor:
        """Return a volume, (D, H, W), as the model takes it, (1, D, H, W)."""
        values = torch.from_numpy(np.ascontiguousarray(volume))[None, None]
        resampled = F.interpolate(values, self.shape[1:], mode="trilinear", align_corners=False)[0]
        return (resampled - self.mean[0]) / self.std[0]


def read_volume(path: Path, most_voxels: int = MOST_VOXELS) -> NDArray[np.float32]:
    """Read a volume, (D, H, W), in the units of the file.

    It is of NIfTI, .nii or .nii.gz (nibabel is needed), or an array .npy. One with more voxels is refused
    before it is unpacked.
    """
    with readable(path, " as a volume"):
        loaded = load_array(path) if has_suffix(path, ARRAYS) else needs("nibabel", path).load(path)
        shape = tuple(map(int, loaded.shape))
        if len(shape) != 3 or 0 in shape:
            raise VitxError(f"{path} holds an array of shape {shape}: a volume has three dimensions")
        check_size(path, shape, most_voxels)
        values = np.array(loaded) if isinstance(loaded, np.ndarray) else loaded.get_fdata(dtype=np.float32)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise VitxError(
            f"{path} holds {values.dtype}, or NaN or infinite values: a volume has finite numbers"
        )
    return values.astype(np.float32)
