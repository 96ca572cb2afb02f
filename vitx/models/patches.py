"""Pictures that a processor has cut into patches: put together, and cut again as the model takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError

# As SigLIP 2's processor calls the sizes of pictures, and Qwen's those of pictures and clips.
_SHAPES, _GRIDS = "spatial_shapes", ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, eq=False)
class Patches:
    """The way pictures are cut into patches.

    Attributes:
        grids: rows and columns of each picture.
        side: of a patch, in pixels.
        merged: patches that are merged later, in each dimension, stand next to one another.
        copies: of each patch, as many as frames of a clip make up one.
        padding: (N, P), what follows the patches of each picture, whose channels come last; None: the next
            picture's do, and channels come first.
    """

    grids: list[tuple[int, int]]
    side: int
    merged: int = 1
    copies: int = 1
    padding: list[Tensor] | None = None

    def join(self, patches: Tensor) -> Tensor:
        """Put pictures together, (n, C, H, W): smaller ones at the upper left."""
        counts = [rows * columns for rows, columns in self.grids]
        if self.padding is None:
            parts = list(patches.split(counts))
        else:
            parts = [one[:count] for one, count in zip(patches, counts, strict=True)]
        pictures = []
        for part, (rows, columns) in zip(parts, self.grids, strict=True):
            sizes, order = self._layout(rows, columns)
            cells = part.view(*sizes[:5], self.copies, *sizes[5:])[:, :, :, :, :, 0]
            pictures.append(cells.permute(order).reshape(-1, rows * self.side, columns * self.side))
        height, width = (max(one.shape[dim] for one in pictures) for dim in (1, 2))
        found = patches.new_zeros(len(pictures), pictures[0].shape[0], height, width)
        for whole, picture in zip(found, pictures, strict=True):
            whole[:, : picture.shape[1], : picture.shape[2]] = picture
        return found

    def cut(self, pictures: Tensor) -> Tensor:
        """Cut pictures, (n, C, H, W), into patches."""
        parts = []
        for picture, (rows, columns) in zip(pictures, self.grids, strict=True):
            sizes, order = self._layout(rows, columns)
            cells = picture[:, : rows * self.side, : columns * self.side].reshape([sizes[at] for at in order])
            cells = cells.permute(torch.tensor(order).argsort().tolist()).unsqueeze(5)
            copies = [self.copies if dim == 5 else -1 for dim in range(8)]
            parts.append(cells.expand(copies).reshape(rows * columns, -1))
        if self.padding is None:
            return torch.cat(parts)
        return torch.stack([torch.cat(pair) for pair in zip(parts, self.padding, strict=True)])

    def _layout(self, rows: int, columns: int) -> tuple[list[int], list[int]]:
        """Return the sizes of a picture's patches, and the order in which these make up the picture."""
        m, side = self.merged, self.side
        grid = [rows // m, columns // m, m, m]
        if self.padding is not None:
            return [*grid, side, side, -1], [6, 0, 2, 4, 1, 3, 5]
        return [*grid, -1, side, side], [4, 0, 2, 5, 1, 3, 6]


def patches_of(model: nn.Module, given: Tensor, others: Mapping[str, Any]) -> Patches | None:
    """Find how a model of transformers takes pictures that its processor has cut into patches.

    Args:
        model: whose config says how large a patch is.
        given: (n, N, P), if `others` have the `spatial_shapes` of the pictures, as SigLIP 2 has them; (N, P)
            of all pictures, if they have `image_grid_thw`, as Qwen2-VL has them.
        others: what else the model takes, by name.

    Returns:
        None where there is neither.

    Raises:
        VitxError: They are cut in a way that is not known.
    """
    name = next((one for one in (_SHAPES, *_GRIDS) if one in others), None)
    if name is None:
        return None
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    config = getattr(config, "vision_config", config)
    side: Any = getattr(config, "patch_size", None)
    sizes, found = [tuple(size) for size in others[name].tolist()], []
    try:
        if name == _SHAPES and given.ndim == 3:
            padding = [one[rows * columns :] for one, (rows, columns) in zip(given, sizes, strict=True)]
            found = [Patches(sizes, side, padding=padding)]
        elif name in _GRIDS and kind.startswith("qwen"):
            grids = [(rows, columns) for frames, rows, columns in sizes for _ in range(frames)]
            merged, copies = config.spatial_merge_size, config.temporal_patch_size
            # Frames that differ are the channels of a picture.
            found = [Patches(grids, side, merged, number) for number in (copies, 1)]
        return next(one for one in found if torch.equal(one.cut(one.join(given)), given))
    except (RuntimeError, ValueError, TypeError, StopIteration):
        pass  # they are not as many as it takes
    raise VitxError(
        f"how pixels of shape {tuple(given.shape)} with {name} {sizes} make up pictures is not known: give "
        "a model of SigLIP 2 or Qwen-VL what its own processor makes of pictures"
    )
