"""Pictures and a prompt, as a vision-language model of transformers takes them."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.inputs.processors import saved_beside

_BEFORE = "PaliGemma"  # whose processor parts pictures and prompt itself
_MARKED = "Qwen"  # whose pictures stand between marks
_NO_INPUTS = frozenset(("labels",))


def saved_processor(model: nn.Module) -> Any:
    """Load the processor that was saved with a model of transformers, or one inside; else a VitxError."""
    names = (getattr(part, "name_or_path", None) for part in model.modules())
    saved = saved_beside(next(filter(None, names), ""), "AutoProcessor")
    if saved is None:
        said = "no processor was saved with the model"
        raise VitxError(f"{said}: give processor=, as transformers.AutoProcessor makes it")
    return saved


def with_prompt(
    model: nn.Module, processor: Any, pictures: Sequence[Image.Image], prompt: str
) -> dict[str, Any]:
    """Prepare pictures and a prompt as the arguments of forward, by name.

    The prompt goes through the processor's chat template, if it has one; else the pictures stand before it.
    A prompt that holds the token of a picture is taken as it is.
    """
    weight = next(model.parameters(), torch.empty(0))
    kind = type(processor).__name__
    try:
        text = _text(processor, len(pictures), prompt)
        found = _processed(processor, [*pictures], text)
    except Exception as error:  # each kind has its own
        said = str(error).split("\n")[0]
        raise VitxError(
            f"{kind} refused {len(pictures)} pictures with the prompt {prompt!r}: {said}"
        ) from error
    return {
        name: one.to(weight.device, weight.dtype if one.is_floating_point() else one.dtype)
        if isinstance(one, Tensor)
        else one
        for name, one in found.items()
        if name not in _NO_INPUTS
    }


def _processed(processor: Any, pictures: list[Image.Image], text: str) -> Any:
    """Some processors take a list of pictures for each prompt, and some one list of all."""
    try:
        return processor(images=[pictures], text=[text], return_tensors="pt")
    except Exception as error:  # each kind has its own
        try:
            return processor(images=pictures, text=[text], return_tensors="pt")
        except Exception:
            raise error from None


def scale_of(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and the standard deviation by which a processor normalises pictures."""
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
