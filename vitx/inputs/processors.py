"""Image and video processors of Hugging Face's transformers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.clips import FRAMES_FIRST, ClipPreprocessing
from vitx.inputs.preprocessing import Preprocessing, channels_taken

_SIDE = 64  # of the pictures that tell what a processor does to black and to white


@dataclass(frozen=True)
class Processor(Preprocessing):
    """The preprocessing of images by an image processor of transformers."""

    processor: Any = None

    def __call__(self, picture: Any) -> Tensor:
        """Return the image as the model takes it, (C, H, W)."""
        return _processed(self.processor, picture.convert("L" if len(self.mean) == 1 else "RGB"))


@dataclass(frozen=True)
class ClipProcessor(ClipPreprocessing):
    """The preprocessing of clips by a processor of transformers: frames first."""

    processor: Any = None

    def __call__(self, clip: Any) -> Tensor:
        """Return a clip, (T, H, W, 3) uint8, as the model takes it, (T, C, H, W)."""
        return _processed(self.processor, [np.array(frame) for frame in clip])  # which may be read-only


def load_processor(
    model: nn.Module, name: str, frames: int = 0, *, local: bool = False, trust: bool = False
) -> Preprocessing:
    """Load the image processor of a model by the name of a folder or on the hub.

    A model of clips gives the number of frames. A local one lies on this machine, and a trusted one may run
    code of its own.
    """
    import transformers

    kinds: Any = transformers  # some without types

    def process(width: int, colour: str) -> Tensor:
        picture = Image.new("RGB", (width, _SIDE), colour)
        if frames:
            return _processed(processor, [np.array(picture)] * frames)[0]
        return _processed(processor, picture.convert("L" if channels_taken(model) == 1 else "RGB"))

    with quiet():
        try:
            processor = kinds.AutoImageProcessor.from_pretrained(
                name, local_files_only=local, trust_remote_code=trust
            )
            black, white, wide = process(_SIDE, "black"), process(_SIDE, "white"), process(2 * _SIDE, "black")
        except Exception as error:  # each kind has its own
            raise VitxError(
                f"{name} holds no image processor that can be used: save one beside the model "
                "(preprocessor_config.json), or name code that makes the model, --model package.module:name, "
                "and give --input-options size=PIXELS mean=V std=V"
            ) from error
    low, high = black.mean((1, 2)), white.mean((1, 2))
    size = black.shape[1], black.shape[2]
    mean, std = tuple((-low / (high - low)).tolist()), tuple((1 / (high - low)).tolist())
    if frames:
        return ClipProcessor(size, mean, std, frames=frames, time_axis=FRAMES_FIRST, processor=processor)
    keeps = wide.shape != black.shape  # as those of detectors
    return Processor(size, mean, std, keep_aspect=keeps, processor=processor)


def saved_processor(model: nn.Module) -> Preprocessing | None:
    """Return the image processor saved where a model of transformers, or one inside, was loaded from."""
    for part in model.modules():
        known = any(kind.__module__.startswith("transformers.") for kind in type(part).__mro__)
        if known and (name := getattr(part, "name_or_path", None)):
            with suppress(VitxError):
                return load_processor(model, str(name), local=True)
            return None
    return None


def _processed(processor: Any, given: Any) -> Tensor:
    """Process one image, or the frames of one clip."""
    found = processor(given, return_tensors="pt")["pixel_values"][0]
    return torch.as_tensor(np.asarray(found), dtype=torch.float32)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and its progress bars while it loads."""
    from transformers.utils import logging as transformers_logging

    told: Any = transformers_logging  # without types
    shown, level = told.is_progress_bar_enabled(), told.get_verbosity()
    hub = logging.getLogger("huggingface_hub")  # tells each try to reach it
    told.disable_progress_bar()
    told.set_verbosity(logging.CRITICAL)
    hub.disabled = True
    try:
        yield
    finally:
        hub.disabled = False
        told.set_verbosity(level)
        if shown:
            told.enable_progress_bar()


def saved_beside(name: str, kind: str) -> Any | None:
    """Load by transformers' "AutoProcessor" or "AutoTokenizer"; None if nothing was saved under a name."""
    if not name:
        return None
    import transformers

    kinds: Any = transformers  # some without types
    try:
        return getattr(kinds, kind).from_pretrained(name, local_files_only=True)
    except Exception:  # each kind has its own
        return None
