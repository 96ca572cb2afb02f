"""Callbacks for PyTorch Lightning: watch a Vision Transformer while it learns."""

from vitx.callbacks.rollout import RolloutCallback

__all__ = ["RolloutCallback"]
