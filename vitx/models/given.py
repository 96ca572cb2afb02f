"""The inputs of a forward beside images, and the layout of images that it wants."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.patches import patches_of

IMAGE_NAMES = "pixel_values", "input_values"  # what Hugging Face's models call what they look at
TEXT_NAMES = "input_ids", "inputs_embeds"
_LABEL = "label"  # in the names of what is true of an image


@dataclass(frozen=True, eq=False)
class Inputs:
    """The parameters of a forward, by name.

    Attributes:
        name: of the images; None: they are all that it takes.
        others: the rest, by name.
        lay: brings images, (n, C, H, W), into the form in which forward takes them.
        together: whether the images are parts of one question, as of one prompt: a score may depend on all
            of them, and they may have several sizes.
    """

    name: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    lay: Callable[[Tensor], Tensor] = lambda images: images
    together: bool = False

    def of(self, images: Tensor) -> dict[str, Any]:
        """Return all of it by name; the rest as copies, as some models change their input."""
        copies = {name: one.clone() if isinstance(one, Tensor) else one for name, one in self.others.items()}
        return {**copies, str(self.name): self.lay(images)}

    def to(self, device: torch.device) -> "Inputs":
        """Return the same on a device."""
        others = self.others.items()
        return replace(self, others={k: v.to(device) if isinstance(v, Tensor) else v for k, v in others})

    def repeated(self, count: int) -> "Inputs":
        """Return what goes with images each of which is there several times, one after the other."""
        if count == 1 or not self.others:
            return self

        def lay(images: Tensor) -> Tensor:
            parts = [self.lay(images[copy::count]) for copy in range(count)]
            return torch.stack(parts, 1).flatten(0, 1)

        others = self.others.items()
        repeated = {k: v.repeat_interleave(count, 0) if isinstance(v, Tensor) else v for k, v in others}
        return replace(self, others=repeated, lay=lay)


ALONE = Inputs()


def read_inputs(model: nn.Module, inputs: Any, image: str | None = None) -> tuple[Tensor, Inputs]:
    """Find the images in what a forward is given by name.

    Args:
        model: that takes it.
        inputs: a mapping of names to values.
        image: the name of the images; None: what Hugging Face calls so, or the only floating-point tensor
            with two dimensions of space.

    Returns:
        The images, (n, C, H, W), and all that is given. Patches are put together to pictures, where it is
        known how these were cut.

    Raises:
        VitxError: There is no image, or it cannot be told which one is.
    """
    if not isinstance(inputs, Mapping):
        raise VitxError(f"inputs must be a mapping of names to tensors, found {type(inputs).__name__}")
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
    """Return what of a batch a forward takes by its names, but for labels; None: no more than images."""
    try:
        takes = inspect.signature(model.forward).parameters if isinstance(batch, Mapping) else {}
    except ValueError:  # only torch knows, as of a traced one
        return None
    found = {key: one for key, one in batch.items() if key in takes and _LABEL not in key} if takes else {}
    return found if len(found) > 1 else None


def _image_name(inputs: Mapping[str, Any], image: str | None) -> str:
    floating = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    if image is not None and image not in floating:
        raise VitxError(f"image={image!r} is no floating-point tensor of inputs, which are {_said(inputs)}")
    named = [name for name in IMAGE_NAMES if name in floating]
    spatial = [name for name, one in floating.items() if one.ndim > 3 and min(one.shape[-2:]) > 1]
    found = [image] if image is not None else named or spatial
    if len(found) != 1:
        raise VitxError(
            f"{'several' if found else 'none'} of the inputs may be the image, which are {_said(inputs)}: "
            "name it by image="
        )
    return found[0]


def _said(inputs: Mapping[str, Any]) -> str:
    def kind(one: Any) -> str:
        tensor = isinstance(one, Tensor)
        return f"{tuple(one.shape)} {one.dtype}".replace("torch.", "") if tensor else type(one).__name__

    return ", ".join(f"{name}: {kind(one)}" for name, one in inputs.items())
