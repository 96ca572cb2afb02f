"""Models of one's own: LightningModules from checkpoints, and what a function or class makes."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitx.errors import VitxError
from vitx.models.checkpoints import fill, read_weights, refuse_code, without_prefix


@contextmanager
def working_folder() -> Iterator[None]:
    """Finds also what lies in the current folder, where people keep their modules, as `python -m` does."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # what was imported may have changed it, too
            sys.path.remove(folder)


@working_folder()
def make_model(
    path: str, options: Mapping[str, Any] | None = None, weights: Path | None = None, trust: bool = False
) -> nn.Module:
    """Makes a model by one's own function or class, as `package.function`, with arguments as for `made`.

    Its weights are those of a file, read as by `read_weights`, or those that it was made with.

    Raises:
        VitxError: There is no such function, it makes no model, or the weights are those of another one.
    """
    model = _call(path, options or {})
    if not isinstance(model, nn.Module):
        raise VitxError(f"{path} must make a torch.nn.Module, found {type(model).__name__}")
    if weights is not None:
        fill(model, without_prefix(read_weights(weights, trust), model.state_dict()), weights)
    return model


def made(value: Any) -> Any:
    """Makes what is described as `{"class_path": ..., "init_args": {...}}`, at any depth of a value.

    Example:
        >>> made({"n": 1, "pool": {"class_path": "torch.nn.MaxPool1d", "init_args": {"kernel_size": 2}}})["n"]
        1

    Raises:
        VitxError: There is no such class or function, or it does not take these arguments.
    """
    if isinstance(value, list):
        return [made(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {name: made(one) for name, one in value.items()}
    arguments = value.get("init_args", {})
    if set(value) - {"class_path", "init_args"} or not isinstance(arguments, Mapping):
        raise VitxError(f"beside class_path only init_args may stand, a mapping: found {dict(value)}")
    return _call(str(value["class_path"]), arguments)


def _call(path: str, options: Mapping[str, Any]) -> Any:
    found, arguments = _find_class(path), made(options)
    try:
        return found(**arguments)
    except VitxError:
        raise
    except Exception as error:  # whatever it does
        raise VitxError(f"{path} could not be made: {_said(error)}") from error


@working_folder()
def load_module(
    class_path: str, checkpoint: Path, options: Mapping[str, Any] | None = None, trust: bool = False
) -> nn.Module:
    """Loads a LightningModule, or any module, from a checkpoint.

    Args:
        class_path: as `package.module.Class`; also from the current folder.
        checkpoint: a .ckpt of Lightning, or of a module that is none: a file of weights.
        options: arguments of the class, see `made`, in place of those that the checkpoint remembers.
        trust: read also checkpoints that run code.

    Raises:
        VitxError: There is no such class or checkpoint, or they do not go together.
    """
    if not checkpoint.is_file():
        raise VitxError(f"there is no checkpoint {checkpoint}")
    found = _find_class(class_path)
    if not hasattr(found, "load_from_checkpoint"):
        return make_model(class_path, options, checkpoint, trust)
    options = made(options or {})
    try:
        if "weights_only" in signature(found.load_from_checkpoint).parameters:
            options = {**options, "weights_only": not trust}
        elif not trust:  # an older Lightning runs any code: this raises first
            torch.load(checkpoint, map_location="meta", weights_only=True)
        module: nn.Module = found.load_from_checkpoint(checkpoint, map_location="cpu", **options)
    except VitxError:
        raise
    except Exception as error:  # whatever the class does as it is made
        if not trust:
            refuse_code(checkpoint)
        said = _said(error)
        hint = "; give it by --module-options" if "missing" in said and "argument" in said else ""
        raise VitxError(f"{class_path} could not be loaded from {checkpoint}: {said}{hint}") from error
    return module


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _find_class(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    if not module:
        raise VitxError(f"{class_path!r} names no class or function: write package.module.Name")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise VitxError(f"there is no class or function {class_path}: {error}") from error
