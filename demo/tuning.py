"""Starting from weights, and training few of them: the head alone, or small changes of the layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from vitx.errors import VitxError
from vitx.models.checkpoints import fill, read_weights, without_prefix


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model of timm from a file; a head of another size keeps its weights."""
    own, heads = model.state_dict(), _heads(model)
    state = without_prefix(read_weights(path), own)
    stems = tuple(f"{name}." for name, module in model.named_modules() if module in heads)
    shapes = {name: value.shape for name, value in state.items()}
    other = {name for name in own if name.startswith(stems) and shapes.get(name) != own[name].shape}
    fill(model, {**state, **{name: own[name] for name in other}}, path)


class LinearProbe(pl.Callback):
    """Train the head alone: the other weights of `module.model`, a model of timm, stay as they are.

    What is frozen is also in evaluation mode, so that nothing is dropped at random.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the weights, before the optimiser is made of those that are not."""
        model: Any = pl_module.model
        model.requires_grad_(False).eval()
        for head in _heads(model):
            head.requires_grad_(True).train()


def add_lora(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Freeze a model of timm but for its head, and add low-rank changes to some layers, which are trained.

    Args:
        model: is changed in place, and keeps its class.
        options: arguments of peft's `LoraConfig`, as `target_modules` and `r`.

    Raises:
        VitxError: peft is not installed, or does not take the options.
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
    """What puts out the logits: one layer, or two in a distilled model."""
    found = model.get_classifier()
    return found if isinstance(found, tuple) else (found,)
