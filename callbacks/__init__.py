"""Callbacks that watch a Vision Transformer while it learns, one module for each framework.

`RolloutCallback` is that of PyTorch Lightning; `vitx.callbacks.huggingface` has one for Hugging Face.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitx.callbacks.lightning import RolloutCallback

__all__ = ["RolloutCallback"]


def __getattr__(name: str) -> Any:
    """Import Lightning when its callback is asked for, and not for the others."""
    if name != "RolloutCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitx.callbacks.lightning import RolloutCallback

    return RolloutCallback
