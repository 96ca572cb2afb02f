"""Accuracy of maps for texts: a tiny CLIP learns to match scenes with words.

    pip install -e ".[demo]"
    python benchmarks/texts.py

The scenes are those of the demo, with two different digits in each, whose boxes do not overlap. The texts
are the words for the ten digits. An image tower (the demo's DeiT) and a text tower learn contrastively, by
the loss of SigLIP: each word matches a scene or not. Then `vitx.targets.text` explains both words of scenes
with held-out digits, if these words are the two nearest.

- own: how often the center of the brightest patch lies in the box of the word's digit
- other: how often it lies in the box of the other digit

This takes about ten minutes on two cores.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import vitx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the demo is not an installed package
from demo.digits import normalized, split_digits  # noqa: E402
from demo.glyphs import digits  # noqa: E402
from demo.scenes import Scenes, cut_fragments, draw_scenes  # noqa: E402
from demo.schedule import warmup_cosine  # noqa: E402
from demo.tuning import load_weights  # noqa: E402
from vitx.models.checkpoints import create_model  # noqa: E402

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTH, LETTERS = 64, 6  # of features; of the longest word, with a final space
BATCH, SCENES, FRAGMENTS = 32, 512, 8192
METHODS = ("evidence", "grad_rollout", "gae", "rollout")
MODEL = {"img_size": 64, "patch_size": 8, "depth": 4}


class Words(nn.Module):
    """A text tower: embedded letters, one transformer layer, and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LETTERS, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features of texts, (T, D)."""
        found: Tensor = self.head(self.layer(self.letters(ids) + self.places).mean(1))
        return found


class Clip(nn.Module):
    """An image tower and a text tower, with the method names of open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = create_model("deit_tiny_patch16_224", False, WIDTH, MODEL)
        load_weights(self.visual, ROOT / "demo" / "letters.safetensors")
        self.text = Words()
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.logit_bias = nn.Parameter(torch.tensor(-4.0))

    def encode_image(self, images: Tensor) -> Tensor:
        """Return the features of images, (B, D)."""
        features: Tensor = self.visual(images)
        return features

    def encode_text(self, ids: Tensor) -> Tensor:
        """Return the features of texts, (T, D)."""
        features: Tensor = self.text(ids)
        return features

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """Return the logits, (B, T), of whether a word matches a scene."""
        found, words = (F.normalize(one, dim=1) for one in (self.encode_image(images), self.encode_text(ids)))
        return self.logit_scale.exp() * found @ words.T + self.logit_bias


def tokenizer(texts: list[str]) -> Tensor:
    """Return the letters of texts as token ids, (T, 6)."""
    return torch.tensor([[*text.ljust(LETTERS).encode()] for text in texts])


class Data:
    """Scenes with two different digits."""

    def __init__(self, seed: int) -> None:
        glyphs, classes = digits()
        self.generator = Generator().manual_seed(seed)
        parts = split_digits(len(glyphs), self.generator)
        self.sets = [(glyphs[part], classes[part]) for part in parts]
        training = self.sets[0][0]
        bank = training[torch.randint(len(training), (FRAGMENTS,), generator=self.generator)]
        self.fragments = cut_fragments(bank, self.generator)

    def draw(self, count: int, part: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, the classes of their digits, (B, 2), and masks of their boxes, (B, 2, 64, 64)."""
        found: list[tuple[Tensor, ...]] = []
        while sum(len(classes) for _, classes, _ in found) < count:
            scenes, classes = self._drawn(2 * count, part)
            both = [Scenes(scenes.images, scenes.ink[:, [digit]]).boxes() for digit in range(2)]
            apart = ~(both[0] & both[1]).flatten(1).any(1)
            found.append((scenes.images[apart], classes[apart], torch.stack(both, 1)[apart]))
        images, classes, boxes = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return normalized(images), classes, boxes

    def _drawn(self, count: int, part: int) -> tuple[Scenes, Tensor]:
        glyphs, classes = self.sets[part]
        picked = torch.randint(len(glyphs), (4 * count, 2), generator=self.generator)
        picked = picked[classes[picked[:, 0]] != classes[picked[:, 1]]][:count]
        return draw_scenes(glyphs[picked], self.fragments, self.generator), classes[picked]


def trained(data: Data, epochs: int, learning_rate: float) -> Clip:
    """Train both towers; the text tower starts from scratch, and learns at four times the rate."""
    model, ids = Clip().train(), tokenizer([*WORDS])
    begun = [one for name, one in model.named_parameters() if name.startswith("visual.")]
    new = [one for name, one in model.named_parameters() if not name.startswith("visual.")]
    groups: list[dict[str, Any]] = [{"params": begun}, {"params": new, "lr": 4 * learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.05)
    per_epoch = len(data.sets[0][0]) // BATCH
    schedule: Any = warmup_cosine(optimizer, per_epoch // 2, epochs * per_epoch)["scheduler"]
    for epoch in range(epochs):
        losses = []
        for _ in range(per_epoch):
            images, classes, _ = data.draw(BATCH)
            wanted = F.one_hot(classes, len(WORDS)).sum(1).float()
            loss = F.binary_cross_entropy_with_logits(model(images, ids), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}", file=sys.stderr, flush=True)
    return model.eval()


def asked(model: Clip, data: Data) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images to explain, with classes and boxes of their digits; print how many they are."""
    images, classes, boxes = data.draw(SCENES, 2)
    with torch.no_grad():
        nearest = torch.cat([model(part, tokenizer([*WORDS])).topk(2).indices for part in images.split(256)])
    known = (classes[:, :, None] == nearest[:, None]).any(2).all(1)
    print(f"both words are the nearest in {known.float().mean():.0%} of {SCENES} scenes, which are explained")
    return images[known], classes[known], boxes[known]


def measured(model: Clip, images: Tensor, classes: Tensor, masks: Tensor, method: str) -> tuple[float, float]:
    """Return how often the brightest patch of a word's map lies on its digit, and on the other digit."""
    hits = []
    for number, word in enumerate(WORDS):
        for digit in range(2):
            shows = classes[:, digit] == number
            if not shows.any():
                continue
            target = vitx.targets.text(word, tokenizer=tokenizer)
            maps = vitx.explain(model, images[shows], method, target=target).maps
            found = [vitx.metrics.pointing_game(maps, masks[shows][:, one]) for one in (digit, 1 - digit)]
            hits.append(torch.stack(found, 1))
    own, other = torch.cat(hits).mean(0).tolist()
    return own, other


def main() -> None:
    """Train, explain, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = Data(options.seed)
    model = trained(data, options.epochs, options.learning_rate)
    images, classes, masks = asked(model, data)
    print(f"area of a box: {masks.float().mean():.2f}\n\n| | own | other |\n| --- | ---: | ---: |")
    for method in METHODS:
        own, other = measured(model, images, classes, masks, method)
        print(f"| **{method}** | {own:.2f} | {other:.2f} |".replace("0.", "."), flush=True)


if __name__ == "__main__":
    main()
