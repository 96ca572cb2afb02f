"""Pretrain the weights that the demo fine-tunes: `python -m demo.pretrain`.

The task differs from the demo's: printed letters instead of handwritten digits. Every patch predicts which
letter its ink belongs to, or that it shows clutter, and traces that ink; the class token predicts which
letters the scene shows. The class token is not shipped: a new one has to learn where to look, which is
what the demo shows.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file, save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from demo.glyphs import ALPHABET, letters
from demo.scenes import cut_fragments, draw_scenes
from demo.schedule import warmup_cosine

CONFIG = Path(__file__).parent.parent / "configs" / "pretrain.yaml"
CLUTTER = len(ALPHABET)  # the class of patches that show no letter
BANK = 8192  # fragments to draw clutter from
MIN_INK = 0.06  # mean ink from which a patch counts as part of a letter
CLUTTER_WEIGHT = 0.1  # most patches show clutter
TRACING_WEIGHT = 2.0

LetterBatch = tuple[Tensor, Tensor, Tensor, Tensor]


class LetterScenes(IterableDataset[LetterBatch]):
    """Endless batches of scenes with one or two letters.

    Each is (images, letter of every patch, ink of the letters, target distribution over the scene's letters).
    The clutter appears over the first `fade_in` batches.
    """

    def __init__(self, batch_size: int, patch_size: int, fade_in: int) -> None:
        self.batch_size, self.patch_size, self.fade_in = batch_size, patch_size, fade_in

    def __iter__(self) -> Iterator[LetterBatch]:
        glyphs, classes = letters()
        bank = cut_fragments(glyphs[torch.randint(len(glyphs), (BANK,))])
        batch = 0
        while True:
            clutter = bank * min(1.0, batch / self.fade_in)
            picked = torch.randint(len(glyphs), (self.batch_size, 2))
            present = torch.ones(self.batch_size, 2)
            present[:, 1] = torch.randint(2, (self.batch_size,))
            scenes = draw_scenes(glyphs[picked] * present[..., None, None], clutter)
            ink, owner = F.avg_pool2d(scenes.ink, self.patch_size).flatten(2).max(1)
            of_patches = classes[picked].gather(1, owner).where(ink > MIN_INK, CLUTTER)
            of_scene = (F.one_hot(classes[picked], len(ALPHABET)) * present[..., None]).sum(1)
            yield scenes.images, of_patches, scenes.ink.amax(1), of_scene / present.sum(1, keepdim=True)
            batch += 1


class LetterFinder(pl.LightningModule):
    """A timm ViT that finds, traces and names the letters in a scene.

    Args:
        model: arguments of `timm.create_model`.
        output: the file to write the weights to.
        weights: a file of weights that an earlier run wrote, to start from.
        batch_size: scenes per step.
        learning_rate: the highest learning rate.
        weight_decay: weight decay of all weights.
        warmup_steps: steps in which the learning rate rises.
        fade_in: steps in which the clutter appears.
        class_token_weight: weight of the class token's loss; 0 leaves the class token untrained.
    """

    def __init__(
        self,
        model: dict[str, Any],
        output: str,
        weights: str | None = None,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 400,
        fade_in: int = 4000,
        class_token_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.vit: Any = timm.create_model(num_classes=0, **model)
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        width = self.vit.embed_dim
        self.namer = nn.Linear(width, CLUTTER + 1)
        self.tracer = nn.Linear(width, self.patch_size**2)
        self.reader = nn.Linear(width, len(ALPHABET))
        if weights:
            self.vit.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
        else:
            _init_positions(self.vit)

    def train_dataloader(self) -> DataLoader[LetterBatch]:
        """Return endless scenes."""
        data = LetterScenes(self.hparams["batch_size"], self.patch_size, self.hparams["fade_in"])
        return DataLoader(data, batch_size=None)

    def training_step(self, batch: LetterBatch, _: int) -> Tensor:
        """Return the sum of the three losses."""
        images, letters_of_patches, ink, letters_of_scene = batch
        tokens = self.vit.forward_features(images * 2 - 1)
        patches = tokens[:, self.vit.num_prefix_tokens :]
        named = self.namer(patches).float()
        weight = torch.ones(CLUTTER + 1, device=self.device)
        weight[CLUTTER] = CLUTTER_WEIGHT
        naming = F.cross_entropy(named.flatten(0, 1), letters_of_patches.flatten(), weight)
        drawn = F.pixel_unshuffle(ink[:, None], self.patch_size).flatten(2).transpose(1, 2)
        tracing = F.binary_cross_entropy_with_logits(self.tracer(patches).float(), drawn)
        reading = F.cross_entropy(self.reader(tokens[:, 0]).float(), letters_of_scene)
        found = named.argmax(-1) == letters_of_patches
        letter = letters_of_patches != CLUTTER
        self.log("naming", naming)
        self.log("tracing", tracing)
        self.log("reading", reading, prog_bar=True)
        self.log("letter_accuracy", found[letter].float().mean(), prog_bar=True)
        self.log("clutter_accuracy", found[~letter].float().mean(), prog_bar=True)
        loss: Tensor = naming + TRACING_WEIGHT * tracing + self.hparams["class_token_weight"] * reading
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with a schedule of warm-up and cosine decay."""
        rate, decay = self.hparams["learning_rate"], self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, weight_decay=decay)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [warmup_cosine(optimizer, self.hparams["warmup_steps"], steps)]

    def on_train_end(self) -> None:
        """Write the backbone with a new class token, in half precision to halve the file."""
        state = self.vit.state_dict()
        new = torch.randn(state["cls_token"].shape, generator=torch.Generator().manual_seed(0))
        position = state["pos_embed"].clone()
        position[:, 0] = 0
        state |= {"cls_token": new, "pos_embed": position}
        save_file({name: value.half() for name, value in state.items()}, self.hparams["output"])


def _init_positions(vit: Any) -> None:
    """Initialize the position embedding with 2-D sines and cosines, which train faster than noise."""
    grid = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = grid * 0.2


def main() -> None:
    """Run the command line."""
    LightningCLI(
        LetterFinder,
        run=True,
        seed_everything_default=0,
        save_config_callback=None,
        args=["fit", "--config", str(CONFIG), *sys.argv[1:]],
    )


if __name__ == "__main__":
    main()
