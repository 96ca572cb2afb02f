"""Loading weights, and training few of them: the head alone, or low-rank updates of some layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from vitx.errors import VitxError
from vitx.models.checkpoints import fill, read_weights, without_prefix


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a timm model from a file; a head of another size keeps its own."""
    own, heads = model.state_dict(), _heads(model)
    state = without_prefix(read_weights(path), own)
    stems = tuple(f"{name}." for name, module in model.named_modules() if module in heads)
    shapes = {name: value.shape for name, value in state.items()}
    other = {name for name in own if name.startswith(stems) and shapes.get(name) != own[name].shape}
    fill(model, {**state, **{name: own[name] for name in other}}, path)


class LinearProbe(pl.Callback):
    """Train the head alone: the other weights of `module.model`, a timm model, are frozen.

    Frozen layers are also in evaluation mode, so that they drop nothing at random.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the weights before the optimizer is created from the others."""
        model: Any = pl_module.model
        model.requires_grad_(False).eval()
        for head in _heads(model):
            head.requires_grad_(True).train()


def add_lora(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Freeze a timm model except for its head, and add trainable low-rank updates to some layers.

    Args:
        model: the model to change in place; it keeps its class.
        options: arguments of peft's `LoraConfig`, such as `target_modules` and `r`.

    Raises:
        VitxError: peft is not installed, or rejects the options.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise VitxError('LoRA needs peft: pip install -e ".[lora]"') from error
    try:
        inject_adapter_in_model(LoraConfig(**options), model)
    except (TypeError, ValueError) as error:
        raise VitxError(f"peft does not take these options of LoRA: {error}") from error
    for head in _heads(model):
        head.requires_grad_(True)


def _heads(model: Any) -> tuple[nn.Module, ...]:
    """Return the layers that output the logits: one, or two in a distilled model."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)
