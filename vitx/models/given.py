"""Inputs of forward other than images, and the layout of images that it takes, such as patches."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError, shown

IMAGE_NAMES = "pixel_values", "input_values"  # of images and spectrograms in Hugging Face models
TEXT_NAMES = "input_ids", "inputs_embeds"
_LABEL = "label"  # in the names of ground truth


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of forward, by name.

    With `together`, all images belong to one question, such as a prompt: a score may depend on all of them,
    and their sizes may differ.
    """

    name: str | None = None  # of the images; None if there are no other inputs
    others: Mapping[str, Any] = field(default_factory=dict)
    lay: Callable[[Tensor], Tensor] = lambda images: images  # from (n, C, H, W) to the layout of forward
    together: bool = False

    def of(self, images: Tensor) -> dict[str, Any]:
        """Return all arguments by name. Other tensors are cloned, as some models modify their input."""
        return {**self._each(Tensor.clone).others, str(self.name): self.lay(images)}

    def to(self, device: torch.device) -> "Inputs":
        """Return these inputs on a device."""
        return self._each(lambda one: one.to(device))

    def repeated(self, count: int) -> "Inputs":
        """Return the inputs for images that are each repeated `count` times in a row."""
        if count == 1 or not self.others:
            return self

        def lay(images: Tensor) -> Tensor:
            parts = [self.lay(images[copy::count]) for copy in range(count)]
            return torch.stack(parts, 1).flatten(0, 1)

        return replace(self._each(lambda one: one.repeat_interleave(count, 0)), lay=lay)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        others = self.others.items()
        return replace(self, others={k: change(v) if isinstance(v, Tensor) else v for k, v in others})


ALONE = Inputs()


def read_inputs(model: nn.Module, inputs: Any, image: str | None = None) -> tuple[Tensor, Inputs]:
    """Find the images, (n, C, H, W), among named arguments of forward; return them and the `Inputs`.

    Unless `image` names them, they have Hugging Face's name for images, or are the only floating-point tensor
    with two spatial dimensions. Patches are joined to pictures if it is known how they were cut.
    """
    if not isinstance(inputs, Mapping):
        raise VitxError(f"inputs must be a mapping of names to tensors, found {shown(inputs)}")
    name = _image_name(inputs, image)
    given, others = inputs[name].detach(), {key: value for key, value in inputs.items() if key != name}
    asks = any(others.get(key) is not None for key in TEXT_NAMES)
    if given.ndim > 4 and asks:  # several pictures, or several parts of each
        shape = given.shape
        return given.flatten(0, -4), Inputs(name, others, lambda images: images.view(shape), together=True)
    if (patches := patches_of(model, given, others)) is None:
        return given, Inputs(name, others, together=asks)
    together = asks or len({*patches.grids}) > 1
    return patches.join(given), Inputs(name, others, patches.cut, together)


def inputs_in(model: Any, batch: Any) -> dict[str, Any] | None:
    """Return the entries of a batch that forward takes by name, without labels; None if at most one."""
    known = parameters_of(model.forward) if isinstance(batch, Mapping) else {}
    found = {key: one for key, one in batch.items() if key in known and _LABEL not in key} if known else {}
    return found if len(found) > 1 else None


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function by name; empty without a signature, as in C or TorchScript."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _image_name(inputs: Mapping[str, Any], image: str | None) -> str:
    floating = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    said = ", ".join(f"{name}: {shown(one)}" for name, one in inputs.items())
    if image is not None and image not in floating:
        raise VitxError(f"image={image!r} is no floating-point tensor of inputs, found {said}")
    named = [name for name in IMAGE_NAMES if name in floating]
    spatial = [name for name, one in floating.items() if one.ndim > 3 and min(one.shape[-2:]) > 1]
    found = [image] if image is not None else named or spatial
    if len(found) != 1:
        count = "several" if found else "none"
        raise VitxError(f"{count} of the inputs may be the image, found {said}: name it by image=")
    return found[0]


# Names of the sizes of pictures in SigLIP 2's processor, and of pictures and clips in Qwen's.
_SHAPES, _GRIDS = "spatial_shapes", ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True, eq=False)
class Patches:
    """The layout of pictures that are cut into patches.

    With `padding`, each picture is (N, P): its patches, then padding; channels come last in a patch. Without,
    the patches of all pictures are concatenated, and channels come first.
    """

    grids: list[tuple[int, int]]  # rows and columns of patches in each picture
    side: int  # of a patch, in pixels
    merged: int = 1  # patches in each dimension that the model merges later, stored next to each other
    copies: int = 1  # of each patch: the number of frames that a patch of a clip spans
    padding: list[Tensor] | None = None

    def join(self, patches: Tensor) -> Tensor:
        """Join patches to pictures, (n, C, H, W), with smaller pictures at the upper left."""
        channels = patches.shape[-1] // (self.side**2 * self.copies)
        sizes = [self.side * max(counts) for counts in zip(*self.grids, strict=True)]
        found = patches.new_zeros(len(self.grids), channels, *sizes)
        places = self._parts(torch.arange(found.numel(), device=found.device).view_as(found))
        given = patches.split([*map(len, places)]) if self.padding is None else patches
        for place, part in zip(places, given, strict=True):
            found.view(-1)[place] = part[: len(place)]
        return found

    def cut(self, pictures: Tensor) -> Tensor:
        """Cut pictures, (n, C, H, W), into patches."""
        parts = self._parts(pictures)
        if self.padding is None:
            return torch.cat(parts)
        return torch.stack([torch.cat(pair) for pair in zip(parts, self.padding, strict=True)])

    def _parts(self, pictures: Tensor) -> list[Tensor]:
        parts = []
        for picture, (rows, columns) in zip(pictures, self.grids, strict=True):
            m, side = self.merged, self.side
            seen = picture[:, : rows * side, : columns * side]
            cells = seen.unflatten(2, (columns // m, m, side)).unflatten(1, (rows // m, m, side))
            if self.padding is None:
                cells = cells.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
                cells = cells.expand(*cells.shape[:5], self.copies, side, side)
            else:
                cells = cells.permute(1, 4, 2, 5, 3, 6, 0)
            parts.append(cells.reshape(rows * columns, -1))
        return parts


def patches_of(model: nn.Module, given: Tensor, others: Mapping[str, Any]) -> Patches | None:
    """Find how the processor of a transformers model cut pictures into patches; None if they are whole.

    SigLIP 2 takes (n, N, P) and `spatial_shapes`, Qwen2-VL (N, P) of all pictures and `image_grid_thw`.
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
            # Different frames of a clip become channels of a picture.
            found = [Patches(grids, side, merged, number) for number in (copies, 1)]
        return next(one for one in found if torch.equal(one.cut(one.join(given)), given))
    except (RuntimeError, ValueError, TypeError, StopIteration):
        pass  # the number of patches does not fit
    said = f"pixels of shape {tuple(given.shape)} with {name} {sizes} cannot be joined to pictures"
    raise VitxError(f"{said}: give a model of SigLIP 2 or Qwen-VL the outputs of its own processor")
