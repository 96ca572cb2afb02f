"""What is explained: which weights, and how they are called."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vitx.callbacks.ranks import in_step
from vitx.errors import VitxError

Forward = Callable[..., Tensor]
_LIGHTNING = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")


def explained_module(trainer: pl.Trainer, module: pl.LightningModule, weights: str) -> nn.Module:
    """Returns the module whose weights are explained.

    Args:
        trainer: with its callbacks, which may hold averaged weights.
        module: the one that is trained.
        weights: "current" or "ema".

    Raises:
        VitxError: There are no averaged weights, or no rank sees all attention heads.
    """
    if weights == "ema":
        return _averaged(trainer, module)
    _refuse_split_heads(trainer)
    # Sharded strategies gather their parameters as the module that they wrap is called.
    return trainer.strategy.model or module if in_step(trainer) else module


def with_forward(module: nn.Module, forward_fn: Forward | None, inputs: Mapping[str, Tensor]) -> nn.Module:
    """Returns a module whose forward takes images alone.

    Args:
        module: the one that is explained.
        forward_fn: a function from it and images to logits; by default its own forward.
        inputs: what else there is of these images: passed on where the forward asks for it by name.

    Raises:
        VitxError: The module has no forward, or asks for more than there is.
    """
    name = "forward_fn" if forward_fn else f"{type(module).__name__}.forward"
    if forward_fn is None and not _has_forward(module):
        raise VitxError(f"{name} is not written: give the callback forward_fn=lambda module, images: ...")
    wanted = _required(forward_fn)[2:] if forward_fn else _required(module.forward)[1:]
    missing = [parameter for parameter in wanted if parameter not in inputs]
    if missing:
        raise VitxError(
            f"{name} takes more than images, and the batch has no {missing[0]!r}: give the callback "
            "forward_fn=lambda module, images: ..., or a batch_transform that names it"
        )
    if forward_fn is None and not wanted:
        return module
    return _Call(module, forward_fn, {parameter: inputs[parameter] for parameter in wanted})


class _Call(nn.Module):
    """Calls a module with images and what belongs to them."""

    def __init__(self, module: nn.Module, function: Forward | None, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.function, self.inputs = module, function, inputs

    def forward(self, images: Tensor) -> Any:
        if self.function is None:
            return self.module(images, **self.inputs)
        return self.function(self.module, images, **self.inputs)


def _has_forward(module: nn.Module) -> bool:
    """Whether anyone wrote one: those of the base classes only raise."""
    return getattr(module.forward, "__module__", "") not in (nn.Module.__module__, *_LIGHTNING)


def _required(function: Callable[..., Any]) -> list[str]:
    """The names of the parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _refuse_split_heads(trainer: pl.Trainer) -> None:
    mesh = getattr(trainer.strategy, "_device_mesh", None)
    if mesh is not None and "tensor_parallel" in mesh.mesh_dim_names and mesh["tensor_parallel"].size() > 1:
        raise VitxError(
            "tensor parallelism gives each rank a part of the attention heads: explain a checkpoint"
        )


def _averaged(trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    held = [value for callback in callbacks for value in vars(callback).values()]
    for candidate in (*held, *module.modules()):
        if isinstance(candidate, (AveragedModel, ModelEmaV2, ModelEmaV3)):
            averaged: nn.Module = candidate.module
            return averaged
    raise VitxError(
        'weights="ema" needs averaged weights: add Lightning\'s EMAWeightAveraging callback, or keep a '
        "torch.optim.swa_utils.AveragedModel or a ModelEmaV3 of timm in the module"
    )
