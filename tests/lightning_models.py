"""A small classifier with every layer that depends on random numbers or on the batch, and data for it."""

from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

IMAGE = 32


def averaging(decay: float) -> pl.Callback:
    """Return Lightning's callback that averages weights; skip if Lightning is too old to have it."""
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip(f"Lightning {pl.__version__} has no EMAWeightAveraging")
    return pl.callbacks.EMAWeightAveraging(decay=decay)


class SmallClassifier(pl.LightningModule):
    """A ViT with dropout, drop path and attention dropout, followed by BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=IMAGE,
            patch_size=8,
            embed_dim=24,
            depth=2,
            num_heads=2,
            num_classes=0,
            pos_drop_rate=0.1,
            proj_drop_rate=0.1,
            attn_drop_rate=0.1,
            drop_path_rate=0.2,
        )
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.vit(images)))

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels = batch[:2]
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, on_step=True)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        images, labels = batch[:2]
        self.log("val/loss", F.cross_entropy(self(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def samples(count: int, seed: int = 0) -> TensorDataset:
    """Return images, labels, and masks of the top left quarter."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, IMAGE, IMAGE, generator=generator)
    masks = torch.zeros(count, IMAGE, IMAGE, dtype=torch.bool)
    masks[:, : IMAGE // 2, : IMAGE // 2] = True
    return TensorDataset(images, torch.arange(count) % 3, masks)


def fit(
    *callbacks: Any, module: Any = SmallClassifier, data: Any = None, library: Any = pl, **options: Any
) -> tuple[Any, Any]:
    """Train identically in every call, by default for two epochs of four steps; `data` are two loaders.

    The module may be a function that makes it, and the library the twin of `lightning.pytorch`.
    """
    pl.seed_everything(1)
    model = module if isinstance(module, nn.Module) else module()
    ckpt_path = options.pop("ckpt_path", None)
    settings = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    with TemporaryDirectory() as folder:  # unless the options name one
        settings |= {"default_root_dir": folder, "callbacks": list(callbacks), **options}
        trainer = library.Trainer(**settings)
        train, held_out = data or (
            DataLoader(samples(16), batch_size=4, shuffle=True),
            DataLoader(samples(8, seed=1), batch_size=4),
        )
        trainer.fit(model, train, held_out, ckpt_path=ckpt_path)
    return trainer, model
