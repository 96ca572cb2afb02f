"""Timm models created by name, and weights read from files."""

import difflib
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from zlib import crc32

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.layers.helpers import to_2tuple
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vitx.errors import VitxError
from vitx.models.network import hub

State = Mapping[str, Tensor]


def create_model(
    name: str, pretrained: bool, num_classes: int | None, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """Create a timm model, with weights from the hub if `pretrained`; by default, with its own classes."""
    options = dict(options or {}) | ({} if num_classes is None else {"num_classes": num_classes})
    try:
        with hub() if pretrained else nullcontext():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        if str(error).startswith(("Invalid pretrained tag", "No pretrained weights")):
            raise VitxError(f"timm has no such weights of {name}: {error}") from error
        if "Unknown model" not in str(error):
            raise VitxError(f"{name} could not be made: {error}") from error
        stem, known = name.split(".")[0], timm.list_models()
        near = [one for one in known if stem in one] + difflib.get_close_matches(stem, known, 5, 0.5)
        near = list(dict.fromkeys(near))[:5]
        raise VitxError(f"timm has no model {name!r}; similar names: {', '.join(near) or 'none'}") from error
    except (OSError, TypeError, ValueError, AssertionError) as error:
        if isinstance(error, OSError | ValueError) and pretrained:  # the hub is offline, or the name unknown
            said = f"the weights of {name} could not be fetched from the hub"
            raise VitxError(f"{said}: check the connection, or give a file (--weights)") from error
        raise VitxError(f"{name} does not take these options: {error}") from error
    if size := options.get("img_size"):  # timm leaves the declared size as it was
        config: Any = model.pretrained_cfg
        config["input_size"] = (3, *to_2tuple(size))
    return model


def model_of_weights(
    name: str, path: Path, options: Mapping[str, Any] | None = None, trust: bool = False
) -> nn.Module:
    """Create a timm model with weights from a file, and with as many classes as these have.

    If the file holds the head separately, as a linear layer next to the backbone, it is loaded from there.
    Without a head, the model has no classes and outputs its features. With `img_size` among the options,
    position embeddings are resampled to it.
    """
    model: Any = create_model(name, False, None, options)
    state = _with_head(model, read_weights(path, trust), path)
    classes = _classes(model, state)
    if classes not in (None, model.num_classes):
        model.reset_classifier(classes)
    if options and "img_size" in options:
        state = _at_size_of(model, state)
    return fill(model, state, path)


def read_weights(path: Path, trust: bool = False) -> State:
    """Read a state dict from a file, which may be the checkpoint of a framework.

    With `trust`, reading the file may run code, and it may hold a whole model.
    """
    if not path.is_file():
        raise VitxError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals([Namespace]):  # the arguments of a training script
            found = torch.load(path, map_location="cpu", weights_only=not trust)
        if isinstance(found, Mapping):
            found = next((found[name] for name in ("state_dict", "model") if name in found), found)
        state = found.state_dict() if isinstance(found, nn.Module) else found
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # each format raises its own errors
        if not trust:
            refuse_code(path)
        raise VitxError(f"{path} holds no weights that can be read: save model.state_dict()") from error


def refuse_code(path: Path) -> None:
    """Raise a VitxError if a torch file refers to functions that are not torch's own."""
    try:
        runs_code = get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a torch file
        return
    if runs_code:
        raise VitxError(f"{path} would run code when read: allow this (--trust) only if you know its source")


def checksum(model: nn.Module) -> int:
    """Return a CRC-32 of the names and values in the state dict of a model."""
    found = 0
    for name, value in model.state_dict().items():
        found = crc32(name.encode(), found)
        if isinstance(value, Tensor):
            found = crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def fill(model: nn.Module, state: State, path: Path) -> nn.Module:
    """Load weights into a model, and return it; raise a VitxError if they do not match."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    other = [f"{name} is {one} and not {two}" for name, (one, two) in shapes.items() if one != two]
    wrong = {"missing": missing, "of another shape": other, "unknown": unknown}
    if counts := [f"{len(found)} {kind} ({found[0]})" for kind, found in wrong.items() if found]:
        said = f"{path} holds weights of another model than this one of {len(own)} tensors"
        raise VitxError(f"{said}: {', '.join(counts)}")
    model.load_state_dict(dict(state))
    return model


def without_prefix(state: State, own: State) -> State:
    """Strip the prefix before the parameter names of the model, and drop all other entries."""
    prefixes = {name.removesuffix(known) for name in state for known in own if name.endswith(known)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    if not prefixes:
        return state
    # Of several equally good ones, take the shortest: averaged weights have a longer one.
    best = max(prefixes, key=lambda prefix: (sum(prefix + known in state for known in own), -len(prefix)))
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def _with_head(model: nn.Module, state: State, path: Path) -> State:
    """Rename weights to match the model, and move a head that is next to the backbone to its place."""
    own = model.state_dict()
    inside, heads = without_prefix(state, own), _heads(model)
    kept = {id(value) for value in inside.values()}
    beside = {name: value for name, value in state.items() if id(value) not in kept}
    bare = len(heads) == 1 and {name for name in own if not name.startswith(f"{heads[0]}.")} == set(inside)
    if not bare or not beside:
        return inside  # the head is in place, there is none, or this is another model
    weights = [name for name in beside if name.endswith(".weight")]
    linear = len(weights) == 1 and set(beside) <= {weights[0], f"{weights[0].removesuffix('weight')}bias"}
    if not linear or beside[weights[0]].shape[1:] != (getattr(model, "num_features", None),):
        raise VitxError(
            f"{path} holds a backbone without a head, and next to it {', '.join(sorted(beside)[:4])}, "
            "which is not a single linear layer: name the code that joins them by --model package.module:name"
        )
    return {**inside, **{f"{heads[0]}.{name.rpartition('.')[2]}": beside[name] for name in beside}}


def _at_size_of(model: Any, state: State) -> State:
    """Resample position embeddings to the model's own grid of patches, as timm does."""
    own, learned = getattr(model, "pos_embed", None), state.get("pos_embed")
    if own is None or learned is None or own.shape == learned.shape or own.shape[-1] != learned.shape[-1]:
        return state
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    resampled = resample_abs_pos_embed(learned, model.patch_embed.grid_size, num_prefix_tokens=prefix)
    return {**state, "pos_embed": resampled}


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that output the logits."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classes(model: nn.Module, state: State) -> int | None:
    """Return the number of classes of the weights: 0 without a head; None if it is not a linear layer."""
    heads = _heads(model)
    if heads and not any(name.startswith(f"{head}.") for head in heads for name in state):
        return 0
    return next((len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state), None)
