"""The cost of a firing of the callback, in training steps of the same model on the same machine.

    python benchmarks/callback_cost.py
    python benchmarks/callback_cost.py --batch 64 --shown 8 --faithfulness --steps 4

Trains a DeiT-Tiny with AdamW on batches of 8 random images of 224 x 224 pixels; after each step, the
callback explains as many images by both methods, draws the grid and writes it to TensorBoard. Steps and
firings alternate, so that a machine that slows down does so for both; all times are medians.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vitx.callbacks import RolloutCallback
from vitx.watch import explaining, observer

PARTS = {
    "explaining": (explaining, "explain_methods"),
    "faithfulness": (explaining, "faithfulness"),
    "measuring": (observer, "measure"),
    "drawing": (observer, "draw"),
    "writing numbers": (observer, "write_scalars"),
    "writing the picture": (observer, "show_picture"),
}
Seconds = dict[str, list[float]]


class Classifier(pl.LightningModule):
    """The model to train."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self.model = timm.create_model(model_name)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Watch(pl.Callback):
    """A callback that times from the start of a step, or from another watch, to its own turn."""

    def __init__(self, seconds: list[float], since: "Watch | None" = None) -> None:
        self.seconds, self.since = seconds, since
        self.at = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start timing."""
        self.at = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop timing, and record the seconds."""
        now = time.perf_counter()
        self.seconds.append(now - (self.since or self).at)
        self.at = now


class FiringWatch(Watch):
    """A watch that also records the time of each part of a firing, summed over all its calls."""

    def __init__(self, seconds: Seconds, sums: dict[str, float], since: Watch) -> None:
        super().__init__(seconds["firing"], since)
        self.all, self.sums = seconds, sums

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop timing, and record the seconds."""
        super().on_train_batch_end()
        for name in PARTS:
            self.all[name].append(self.sums.pop(name, 0.0))


def timed(function: Callable[..., Any], name: str, sums: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function so that the seconds of its calls are summed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            sums[name] = sums.get(name, 0.0) + time.perf_counter() - start

    return call


def measure(model_name: str, batch: int, size: int, steps: int, **watched: Any) -> Seconds:
    """Return the seconds of each step, firing, and part of one; `watched` are options of the callback."""
    seconds: Seconds = defaultdict(list)
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch)
    data = DataLoader(TensorDataset(images, labels), batch_size=batch)
    step, sums = Watch(seconds["step"]), dict[str, float]()
    callbacks = [
        step,
        RolloutCallback(images=images, every_n_steps=1, every_n_epochs=None, on_error="raise", **watched),
        FiringWatch(seconds, sums, since=step),
    ]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, (module, function) in PARTS.items():
            stack.enter_context(patch.object(module, function, timed(getattr(module, function), name, sums)))
        trainer = pl.Trainer(
            max_epochs=steps,
            accelerator="cpu",
            logger=TensorBoardLogger(folder),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(model_name), data)
    return {name: values[1:] for name, values in seconds.items()}  # the first ones warm up


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="any Vision Transformer of timm")
    parser.add_argument("--batch", type=int, default=8, help="images in a training step, and explained")
    parser.add_argument("--shown", type=int, help="images in the grid (default: all)")
    parser.add_argument("--methods", nargs="+", default=["rollout", "grad_rollout"], help="methods to use")
    parser.add_argument("--faithfulness", action="store_true", help="measure it at each firing")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=12, help="steps, each followed by a firing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    watched = {
        "num_images": (options.shown or options.batch, options.batch),
        "methods": options.methods,
        "faithfulness": options.faithfulness,
    }
    found = measure(options.model, options.batch, options.size, options.steps, **watched)
    times = {name: median(values) for name, values in found.items()}
    step, firing = times.pop("step"), times.pop("firing")
    print(f"{options.model}, {options.batch} x {options.size} px, {options.threads} threads")
    print(f"{', '.join(options.methods)}{', with faithfulness' if options.faithfulness else ''}")
    print(f"{'':24}seconds   steps   share")
    times["the rest"] = firing - sum(times.values())
    for name, value in {"a training step": step, "a firing": firing, **times}.items():
        print(f"{name:24}{value:7.3f}{value / step:8.2f}{value / firing:8.0%}")


if __name__ == "__main__":
    main()
