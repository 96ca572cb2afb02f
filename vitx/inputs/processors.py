"""Processors of Hugging Face transformers, for images, clips, and pictures with a prompt."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.clips import ClipPreprocessing
from vitx.inputs.preprocessing import Preprocessing, channels_taken

_BEFORE = "PaliGemma"  # adds the separator of pictures and prompt itself
_MARKED = "Qwen"  # encloses pictures in marker tokens
_SIDE = 64  # of test pictures, which show how a processor maps black and white


def load_processor(
    model: nn.Module, name: str, frames: int = 0, *, local: bool = False, trust: bool = False
) -> Preprocessing:
    """Load the image processor of a model from a folder or the hub.

    `frames` is the number of frames that a model of clips takes. With `local`, only files on this machine
    are used. With `trust`, the processor may run code of its own.
    """
    transformers = import_module("transformers")
    mode = "L" if channels_taken(model) == 1 else "RGB"

    def process(given: Any) -> Tensor:
        """Process an image, or the frames of a clip, which may be read-only."""
        images = [np.array(frame) for frame in given] if frames else given.convert(mode)
        found = processor(images, return_tensors="pt")["pixel_values"][0]
        return torch.as_tensor(np.asarray(found), dtype=torch.float32, device="cpu")

    def tried(width: int, color: str) -> Tensor:
        picture = Image.new("RGB", (width, _SIDE), color)
        return process([picture] * frames)[0] if frames else process(picture)

    with quiet():
        try:
            load = transformers.AutoImageProcessor.from_pretrained
            processor = load(name, local_files_only=local, trust_remote_code=trust)
            black, white, wide = tried(_SIDE, "black"), tried(_SIDE, "white"), tried(2 * _SIDE, "black")
        except Exception as error:  # each kind raises its own errors
            said = f"{name} holds no image processor that can be used: save one (preprocessor_config.json)"
            code = "name code that makes the model, --model package.module:name"
            options = "--input-options size=PIXELS mean=V std=V"
            raise VitxError(f"{said} beside the model, or {code}, and give {options}") from error
    low, high = black.mean((1, 2)), white.mean((1, 2))
    size = black.shape[1], black.shape[2]
    mean, std = tuple((-low / (high - low)).tolist()), tuple((1 / (high - low)).tolist())
    if frames:
        return ClipPreprocessing(size, mean, std, process=process, frames=frames, channels=2)
    keeps = wide.shape != black.shape  # as processors of detectors do
    return Preprocessing(size, mean, std, keep_aspect=keeps, process=process)


def saved_preprocessing(model: nn.Module) -> Preprocessing | None:
    """Return the preprocessing saved with a transformers model, or with one inside; None if there is none."""
    with suppress(VitxError):
        return load_processor(model, name, local=True) if (name := _saved_as(model)) else None
    return None


def _saved_as(model: nn.Module) -> str:
    """Return where a transformers model, or one inside, was loaded from; empty if it was not loaded."""
    names = (getattr(part, "name_or_path", None) for part in model.modules())
    return next((name for name in names if isinstance(name, str) and name), "")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and its progress bars while it loads."""
    hf_logging = import_module("transformers.utils.logging")
    shown, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hub = logging.getLogger("huggingface_hub")  # logs each attempt to reach it
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.CRITICAL)
    hub.disabled = True
    try:
        yield
    finally:
        hub.disabled = False
        hf_logging.set_verbosity(level)
        if shown:
            hf_logging.enable_progress_bar()


def saved_beside(name: str, kind: str) -> Any | None:
    """Load a local "AutoProcessor" or "AutoTokenizer" of transformers by name; None if there is none."""
    if not name:
        return None
    try:
        return getattr(import_module("transformers"), kind).from_pretrained(name, local_files_only=True)
    except Exception:  # each kind raises its own errors
        return None


def saved_processor(model: nn.Module) -> Any:
    """Load the processor saved with a transformers model, or one inside; without one, raise a VitxError."""
    saved = saved_beside(_saved_as(model), "AutoProcessor")
    if saved is None:
        said = "no processor was saved with the model"
        raise VitxError(f"{said}: give one by processor=, from transformers.AutoProcessor")
    return saved


def with_prompt(
    model: nn.Module, processor: Any, pictures: Sequence[Image.Image], prompt: str
) -> dict[str, Any]:
    """Prepare pictures and a prompt as named arguments of forward.

    The prompt is formatted by the processor's chat template, if it has one; else the pictures come first.
    A prompt that contains an image token is used unchanged.
    """
    weight = next(model.parameters(), torch.empty(0))
    errors: list[Exception] = []
    for images in ([[*pictures]], [*pictures]):  # some take one list per prompt, others one for all
        try:
            text = _text(processor, len(pictures), prompt)
            found = processor(images=images, text=[text], return_tensors="pt")
            break
        except Exception as error:  # each kind raises its own errors
            errors.append(error)
    else:
        kind, said = type(processor).__name__, str(errors[0]).split("\n")[0]
        refused = f"{kind} refused {len(pictures)} pictures with the prompt {prompt!r}"
        raise VitxError(f"{refused}: {said}") from errors[0]
    for name, one in found.items():
        if isinstance(one, Tensor):
            found[name] = one.to(weight.device, weight.dtype if one.is_floating_point() else one.dtype)
    return {name: one for name, one in found.items() if name != "labels"}


def scale_of(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and std by which a processor normalizes pictures; 0 and 1 if it does not."""
    images = getattr(processor, "image_processor", processor)
    if not getattr(images, "do_normalize", False):
        return (0.0,), (1.0,)
    return images.image_mean, images.image_std


def _text(processor: Any, pictures: int, prompt: str) -> str:
    token, kind = getattr(processor, "image_token", None), type(processor).__name__
    token = str(getattr(token, "content", token or "<image>"))
    if token in prompt:
        return prompt
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * pictures, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        said: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return said
    if kind.startswith(_MARKED):
        token = f"<|vision_start|>{token}<|vision_end|>"
    return (token if kind.startswith(_BEFORE) else f"{token}\n") * pictures + prompt
