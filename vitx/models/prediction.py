"""Logits of a model for images, and the scores that a target selects from them."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError, failure, shown
from vitx.models.given import ALONE, IMAGE_NAMES, TEXT_NAMES, Inputs, parameters_of
from vitx.models.outputs import described, part

MadeLast = Callable[[Sequence[Tensor]], Tensor | None]
Target = int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None
# Names of the final output in Hugging Face models.
_LOGITS = "logits", "logits_per_image", "image_embeds", "pooler_output", "last_hidden_state"
_BATCHED = ": add a batch dimension with images[None]"
_LAST = ": put the channels first with images.permute(0, 3, 1, 2)"
_INPUTS = 'give all by inputs={{"{}": ..., "{}": ...}}'
_ASKS = (
    f"the model also takes text, and failed without it: {_INPUTS}, or use a target such as vitx.targets.text "
    "or vitx.targets.word"
)
_TARGETS = (
    "target must be None, the number of a class (only the shell takes names), one for each image, a "
    "function, or one of vitx.targets"
)
_CALLBACK = "(to the callback, give forward_fn=lambda module, images: ...)"
_CHOOSE = f"wrap it so that it returns the one to explain {_CALLBACK}"


def check_model(model: Any) -> None:
    """Raise a VitxError unless the model is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise VitxError(f"the model must be a torch.nn.Module, found {type(model).__name__}")


def check_images(model: nn.Module, images: Any) -> None:
    """Raise a VitxError if the shape, dtype or device of the images does not fit the model."""
    check_model(model)
    if not isinstance(images, Tensor):
        wanted = "a floating-point tensor (B, C, H, W), uint8 arrays (H, W, 3), PIL images or files"
        raise VitxError(f"images must be {wanted}, found {shown(images)}")
    if images.ndim not in (3, 4, 5) or 0 in images.shape:
        wanted = "(B, C, H, W), clips (B, C, T, H, W) or (B, T, C, H, W), or spectrograms (B, F, T)"
        raise VitxError(f"images must be {wanted}, and not empty, found {tuple(images.shape)}")
    if not images.is_floating_point():
        raise VitxError(f"images must be floating point, found {images.dtype}: normalize them as in training")
    weight = next(model.parameters(), images)
    if weight.device != images.device:
        raise VitxError(f"the images are on {images.device} and the model is on {weight.device}: move one")
    kind = images.device.type
    rounds = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if weight.dtype != images.dtype and not rounds and _precision(model) is None:
        raise VitxError(f"the images are {images.dtype} and the model is {weight.dtype}: convert one")


def predict(model: nn.Module, images: Tensor, inputs: Inputs = ALONE) -> Tensor:
    """Run the model and return its logits, (B, ...)."""
    return read_logits(forward(model, images, inputs), images, inputs=inputs)


def read_logits(
    output: Any, images: Tensor, made_last: MadeLast | None = None, inputs: Inputs = ALONE
) -> Tensor:
    """Return the logits, (B, ...), in an output; `made_last` picks the tensor that depends on the others."""
    logits = _logits(output, len(images), made_last)
    if logits.ndim in (1, 2) and len(logits) != len(images) and not inputs.together:
        hint = _BATCHED if images.ndim == 3 else ": wrap it so that it returns one row for each"
        given = f"{len(images)} images of shape {tuple(images.shape[1:])}"
        raise VitxError(f"the model returned {tuple(logits.shape)} for {given}{hint}")
    return logits


def _precision(model: Any) -> Any:
    """Return the precision of a model wrapped by Lightning Fabric; None for other models."""
    wrapped = type(model).__module__ in ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
    return model._strategy.precision if wrapped else None


def forward(model: Any, images: Tensor, inputs: Inputs = ALONE) -> Any:
    """Run the model; Hugging Face models that take several inputs get the images by name."""
    precision = _precision(model)
    if precision is not None:  # the wrapper blocks a backward pass that others start from its output
        ((images,), _) = precision.convert_input(((images,), {}))
        with precision.forward_context():
            return forward(model._forward_module, images, inputs)
    known = [] if inputs.name else _asked(model)
    named = inputs.name or next((name for name in IMAGE_NAMES if name in known), None)
    asks = next((name for name in TEXT_NAMES if name in known), None) if named else None
    with refusals(images, inputs, None if asks is None else _ASKS.format(named, asks)):
        return model(images) if named is None else model(**replace(inputs, name=named).of(images))


@contextmanager
def refusals(images: Tensor, inputs: Inputs, reason: str | None = None) -> Iterator[None]:
    """Turn an error of the block into a VitxError that says why these images were refused, or `reason`."""
    try:
        yield
    except VitxError:
        raise
    except Exception as error:
        said = str(error).split("\n")[0].rstrip(".")
        # timm and torchvision assert, Hugging Face raises ValueErrors; other errors are left unchanged.
        about_size = "channels" in said or "size of tensor" in said or "cannot be multiplied" in said
        kinds = (AssertionError, ValueError, *((TypeError, RuntimeError) if inputs.name else ()))
        told = isinstance(error, kinds) or (about_size and isinstance(error, RuntimeError))
        if reason is None and (not told or isinstance(error, torch.OutOfMemoryError)):
            raise
        beside = f" with {', '.join(inputs.others)}" if inputs.others else ""
        last = images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] > 3
        hint = _BATCHED if images.ndim == 3 and not inputs.name else _LAST if last else ""
        refused = f"the model refused images of shape {tuple(images.shape)}{beside}: {said}{hint}"
        raise VitxError(reason or refused) from error


def _asked(model: Any) -> list[str]:
    """Return the parameter names of forward; raise a VitxError if it requires more than images."""
    asked = [
        p for p in parameters_of(model.forward).values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    missing = [p.name for p in asked if p.default is p.empty and p.name not in IMAGE_NAMES]
    named = next((p.name for p in asked if p.name in IMAGE_NAMES), None)
    if len(missing) > (0 if named else 1):
        image, *needs = [named, *missing] if named else missing
        said = f"the model takes more than images, {', '.join(needs)}"
        raise VitxError(f"{said}: {_INPUTS.format(image, needs[0])} {_CALLBACK}")
    return [p.name for p in asked]


def _logits(output: Any, batch: int, made_last: MadeLast | None) -> Tensor:
    """Find the logits in an output: by name, else the only scores, else the scores computed last."""
    if isinstance(output, Tensor):
        return output
    if (found := part(output, *_LOGITS)) is not None:
        return found
    output = vars(output) if is_dataclass(output) else output
    if isinstance(output, Mapping):
        parts, kind = dict(output), f"a dict with the keys {', '.join(map(str, output))}"
    else:
        parts = dict(enumerate(output)) if isinstance(output, Iterable) else {}
        kind = f"a {type(output).__name__} of {len(parts)}" if parts else type(output).__name__
    tensors = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    scores = {name: t for name, t in tensors.items() if t.ndim in (1, 2) and len(t) == batch}
    named = {name: t for name, t in scores.items() if t.is_floating_point()} or tensors
    several = list(named.values())
    if not several:
        raise VitxError(f"the model must return logits, found {kind}: {_CHOOSE}")
    last = several[0] if len(several) == 1 else made_last(several) if made_last else None
    if last is None:
        shapes = ", ".join(f"{name}: {tuple(one.shape)}" for name, one in named.items())
        said = f"the model returns {kind}, with {len(several)} tensors, {shapes}"
        raise VitxError(f"{said}, none of which depends on all others: {_CHOOSE}")
    return last


def target_classes(target: Target, logits: Tensor) -> Tensor | None:
    """Return the target class of each image, (B,); None if the target is a function."""
    if callable(target) and not isinstance(target, Tensor):
        return None
    if logits.ndim not in (1, 2):
        if target is None:
            return None  # methods without a class need none; for the others, `scores` raises
        raise _no_classes(logits)
    single = _single(logits)
    batch, classes = len(logits), 2 if single is not None else logits.shape[1]
    if target is None:
        return logits.argmax(1) if single is None else (single > 0).long()
    found = whole_numbers(target, _TARGETS)
    if found.ndim and len(found) != batch:
        raise VitxError(f"target names {len(found)} classes for {batch} images: give one for each image")
    check_range("target", found, "classes", classes)
    return found.long().to(logits.device).expand(batch).clone()


def check_range(noun: str, given: Tensor, nouns: str, count: int) -> None:
    """Raise a VitxError unless all given indices are from 0 to count - 1."""
    for index in given.flatten().tolist():
        if not 0 <= index < count:
            raise VitxError(f"{noun} {index} is out of range: the model has {nouns} 0 to {count - 1}")


def _no_classes(logits: Tensor) -> VitxError:
    return VitxError(f"{described(logits)}, or give a function from it to scores (B,)")


def _single(logits: Tensor) -> Tensor | None:
    """Return the logit of each image, (B,), if there is a single one: that of class 1 against class 0."""
    return logits.flatten() if logits.shape[1:] in ((), (1,)) else None


def whole_numbers(given: Any, form: str) -> Tensor:
    """Return one or several whole numbers, () or (N,), or raise a VitxError, which states their form."""
    found = numbers(given, form)
    if found.is_floating_point() or found.dtype == torch.bool or found.ndim > 1 or not found.numel():
        raise VitxError(f"{form}, found {given!r}")
    return found


def numbers(given: Any, form: str, kind: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor, or raise a VitxError, which states their form."""
    try:
        return torch.as_tensor(given, dtype=kind, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise VitxError(f"{form}, found {reprlib.repr(given)}") from None


def difference(target: int, other: int) -> Callable[[Tensor], Tensor]:
    """Return a target function that contrasts two classes: the difference of their scores."""

    def score(logits: Tensor) -> Tensor:
        first, second = (scores(None, logits, target_classes(index, logits)) for index in (target, other))
        return first - second

    return score


def scores(target: Target, logits: Tensor, classes: Tensor | None) -> Tensor:
    """Return the score of each image, (B,): the logit of its class, or the value of the target function."""
    if classes is not None:
        if (single := _single(logits)) is not None:
            return torch.where(classes == 1, single, -single)
        return logits.gather(1, classes[:, None])[:, 0]
    if not callable(target):
        raise _no_classes(logits)
    with failure(f"the target function failed on the output, {tuple(logits.shape)}"):
        found = target(logits)
    if not isinstance(found, Tensor) or found.shape != logits.shape[:1]:
        raise VitxError(f"the target function must return scores ({len(logits)},), found {shown(found)}")
    return found
