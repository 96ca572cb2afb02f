"""Images that a plain loop gives the model, beside those that its loader holds."""

from typing import Any

import torch
from torch import Tensor, nn

from vitx.inputs.preprocessing import normalization
from vitx.pictures.colors import UNSCALED
from vitx.watch.nested import tensors_of
from vitx.watch.step import is_compiled

_FEWEST = 4  # dimensions of images
_FACTOR = 2.0  # between spreads of the values: more is another scale
_GIVE = "batch_transform=lambda batch: ..., which does to a batch what your loop does to it before the model"


class FirstCall:
    """Keep the images of the first call of a model that a loop makes, and then leave the model alone."""

    def __init__(self, model: nn.Module) -> None:
        self.images: Tensor | None = None  # (B, ...), in host memory, once the model was called
        self.paused = False  # while vitx itself calls the model
        self._hook: Any = None
        if not is_compiled(model):
            self._hook = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        """Keep nothing: a copy of the model that is made before its first call sees none."""
        return {"images": None, "paused": True, "_hook": None}

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.paused or self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        given = [tensor for _, tensor in tensors_of((args, kwargs)) if tensor.ndim >= _FEWEST]
        self.images = given[0].detach().to("cpu", torch.float32, copy=True) if given else None


def differs(given: Tensor, held: Tensor) -> str | None:
    """Say how images that a loop gives the model, (B, ...), differ from those of the loader; None: not."""
    if given.shape[1:] != held.shape[1:]:
        one, other = (" x ".join(map(str, images.shape[1:])) for images in (given, held))
    else:
        held = held.float()
        spread = given.std() / held.std().clamp_min(1e-12)
        moved = (given.mean() - held.mean()).abs() / torch.maximum(given.std(), held.std()).clamp_min(1e-12)
        if 1 / _FACTOR <= spread <= _FACTOR and moved <= 1:
            return None
        one, other = (f"from {images.amin():.3g} to {images.amax():.3g}" for images in (given, held))
    return f"your loop gave the model images {one}, and the loader holds images {other}: give {_GIVE}"


def not_normalized(model: nn.Module, images: Tensor) -> str | None:
    """Say that images lie in [0, 1] where the model declares another scale; None where they do not."""
    mean, std = normalization(model)
    if (tuple(mean), tuple(std)) == UNSCALED or images.amin() < 0 or images.amax() > 1:
        return None
    said = ", ".join(f"{value:.3g}" for value in mean)
    found = f"the images lie in [0, 1], and the model declares mean {said}"
    return f"{found}: if your loop normalises, give {_GIVE}"
