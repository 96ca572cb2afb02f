"""Callbacks that watch a Vision Transformer while it learns, with one module for each framework.

`RolloutCallback` is the one for PyTorch Lightning; that for Hugging Face is in `vitx.callbacks.huggingface`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitx.callbacks.lightning import RolloutCallback

__all__ = ["RolloutCallback"]


def __getattr__(name: str) -> Any:
    """Import Lightning only when its callback is accessed."""
    if name != "RolloutCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vitx.callbacks.lightning import RolloutCallback

    return RolloutCallback
