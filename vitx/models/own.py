"""Models from the user's own classes and functions, including LightningModules from checkpoints."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from vitx.errors import VitxError, failure, in_words
from vitx.models.checkpoints import fill, read_weights, refuse_code, without_prefix


@contextmanager
def working_folder() -> Iterator[None]:
    """Make modules in the current folder importable inside the block, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # imported code may have changed it, too
            sys.path.remove(folder)


@working_folder()
def load_own(
    path: str, weights: Path | None = None, options: Mapping[str, Any] | None = None, trust: bool = False
) -> nn.Module:
    """Make a model with the user's own class or function, which may be in the current folder.

    A LightningModule is loaded from its checkpoint; `options` override the hyperparameters saved there.
    """
    if weights is not None and not weights.is_file():
        raise VitxError(f"there is no weights file {weights}")
    found = _resolved(path)
    if weights is not None and hasattr(found, "load_from_checkpoint") and _of_lightning(weights):
        return _from_checkpoint(found, path, weights, made(options or {}), trust)
    model = _call(path, options or {})
    if not isinstance(model, nn.Module):
        raise VitxError(f"{path} must make a torch.nn.Module, found {type(model).__name__}")
    if weights is not None:
        fill(model, without_prefix(read_weights(weights, trust), model.state_dict()), weights)
    return model


def _of_lightning(weights: Path) -> bool:
    """Return whether a file is a Lightning checkpoint, not plain weights; True if it cannot be read."""
    if weights.suffix == ".safetensors":
        return False
    try:
        kept = torch.load(weights, map_location="meta", weights_only=True)
    except Exception:  # it would run code, or its format raises errors of its own
        return True
    return isinstance(kept, Mapping) and "pytorch-lightning_version" in kept


def made(value: Any) -> Any:
    """Instantiate all `{"class_path": ..., "init_args": {...}}` in a value, at any depth."""
    if isinstance(value, list):
        return [made(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {name: made(one) for name, one in value.items()}
    arguments = value.get("init_args", {})
    if set(value) - {"class_path", "init_args"} or not isinstance(arguments, Mapping):
        raise VitxError(f"next to class_path, only init_args is allowed, as a mapping: found {dict(value)}")
    return _call(str(value["class_path"]), arguments)


def _call(path: str, options: Mapping[str, Any]) -> Any:
    found, arguments = _resolved(path), made(options)
    with failure(f"{path} could not be made"):
        return found(**arguments)


def _from_checkpoint(
    found: Any, path: str, checkpoint: Path, options: Mapping[str, Any], trust: bool
) -> nn.Module:
    """Load a LightningModule from its checkpoint."""
    try:
        if "weights_only" in signature(found.load_from_checkpoint).parameters:
            options = {**options, "weights_only": not trust}
        elif not trust:  # an older Lightning would run any code: this raises first
            torch.load(checkpoint, map_location="meta", weights_only=True)
        module: nn.Module = found.load_from_checkpoint(checkpoint, map_location="cpu", **options)
    except VitxError:
        raise
    except Exception as error:  # the constructor may raise anything
        if not trust:
            refuse_code(checkpoint)
        said = in_words(error)
        hint = "; give it by --model-options" if "missing" in said and "argument" in said else ""
        raise VitxError(f"{path} could not be loaded from {checkpoint}: {said}{hint}") from error
    return module


def _resolved(path: str) -> Any:
    """Return the object that `package.module:name` or `package.module.name` refers to."""
    if not path.replace(":", ".").strip(".").count("."):
        raise VitxError(f"{path!r} names no class or function: write package.module:name")
    try:
        return resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise VitxError(f"there is no class or function {path}: {error}") from error
