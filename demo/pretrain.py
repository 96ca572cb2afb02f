"""Makes the weights that the demo fine-tunes: `python -m demo.pretrain`.

The task is another one than the demo's: printed letters instead of handwritten digits, and every
patch says which letter its ink belongs to, or that it shows clutter. The class token takes no part in
it, so it has yet to learn where to look: this is what the demo then shows.
"""

from pathlib import Path
from typing import Any

import lightning as pl
import timm
import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from demo.glyphs import ALPHABET, letters
from demo.scenes import cut_fragments, draw_scenes

CLUTTER = len(ALPHABET)  # the class of patches that show no letter
BANK = 8192  # fragments to draw clutter from
MIN_INK = 0.06  # mean ink from which a patch counts as part of a letter
CLUTTER_WEIGHT = 0.1  # most patches show clutter


class LetterScenes(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of scenes with one or two letters and the class of every patch."""

    def __init__(self, batch_size: int, patch_size: int, fade_in: int) -> None:
        """Args: fade_in: number of batches over which the clutter appears."""
        self.batch_size, self.patch_size, self.fade_in = batch_size, patch_size, fade_in

    def __iter__(self) -> Any:
        glyphs, classes = letters()
        bank = cut_fragments(glyphs[torch.randint(len(glyphs), (BANK,))])
        batch = 0
        while True:
            clutter = bank * min(1.0, batch / self.fade_in)
            picked = torch.randint(len(glyphs), (self.batch_size, 2))
            shown = glyphs[picked]
            shown[:, 1] *= torch.randint(2, (self.batch_size, 1, 1))
            scenes = draw_scenes(shown, clutter)
            ink, owner = F.avg_pool2d(scenes.ink, self.patch_size).flatten(2).max(1)
            letter = classes[picked].gather(1, owner)
            yield scenes.images, letter.where(ink > MIN_INK, CLUTTER), scenes.ink.amax(1)
            batch += 1


class LetterFinder(pl.LightningModule):
    """A timm ViT that names the letter in every patch."""

    def __init__(
        self,
        model: dict[str, Any],
        output: Path,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 400,
        fade_in: int = 4000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vit = timm.create_model(num_classes=0, **model)
        self.head = nn.Linear(self.vit.embed_dim, CLUTTER + 1)
        self.tracer = nn.Linear(self.vit.embed_dim, self.vit.patch_embed.patch_size[0] ** 2)
        weight = torch.ones(CLUTTER + 1)
        weight[CLUTTER] = CLUTTER_WEIGHT
        self.register_buffer("weight", weight)
        _init_positions(self.vit)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        patch = self.vit.patch_embed.patch_size[0]
        data = LetterScenes(self.hparams["batch_size"], patch, self.hparams["fade_in"])
        return DataLoader(data, batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, target, ink = batch
        tokens = self.vit.forward_features(images * 2 - 1)[:, self.vit.num_prefix_tokens :]
        logits = self.head(tokens).float()
        naming = F.cross_entropy(logits.flatten(0, 1), target.flatten(), self.weight)
        p = self.vit.patch_embed.patch_size[0]
        drawn = F.pixel_unshuffle(ink[:, None], p).flatten(2).transpose(1, 2)
        tracing = F.binary_cross_entropy_with_logits(self.tracer(tokens).float(), drawn)
        self.log("train/tracing", tracing, prog_bar=True)
        loss = naming + 2 * tracing
        right = (logits.argmax(-1) == target).float()
        letter = target != CLUTTER
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/letter_accuracy", right[letter].mean(), prog_bar=True)
        self.log("train/clutter_accuracy", right[~letter].mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        rate, decay = self.hparams["learning_rate"], self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=decay)
        warmup, steps = self.hparams["warmup_steps"], int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
            ],
            milestones=[warmup],
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_end(self) -> None:
        """Writes the backbone in half precision: half the bytes, the same accuracy."""
        weights = {name: value.half() for name, value in self.vit.state_dict().items()}
        save_file(weights, self.hparams["output"])


def _init_positions(vit: nn.Module) -> None:
    """Starts the position embedding from 2-D sines and cosines, which learns sooner than noise."""
    from timm.layers import build_sincos2d_pos_embed

    grid = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = grid * 0.2


def main() -> None:
    LightningCLI(
        LetterFinder,
        run=True,
        seed_everything_default=0,
        save_config_callback=None,
        args=["fit", "--config", "configs/pretrain.yaml"],
    )


if __name__ == "__main__":
    main()
