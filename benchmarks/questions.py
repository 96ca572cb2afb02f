"""Accuracy of maps for questions other than a class: a region, and the similarity of two pictures.

Each small model learns a task with a known cause, and is explained then. This takes a few minutes.

    python benchmarks/questions.py
"""

from argparse import ArgumentParser
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitx
from vitx.metrics import box_masks, energy_inside
from vitx.targets import region, similar_to

SIDE, PATCH, SQUARE = 32, 4, 12
HALF_WIDTH = SIDE // 2
MEAN, STD, NOISE = 0.5, 0.25, 0.05  # normalization of pictures, and the noise on their gray
SCALE, HALF = 10.0, 0.4  # of cosines, and the cosine at which two pictures match with probability 1/2
METHODS = ("evidence", "grad_rollout", "gae", "rollout")
COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.9], [0.9, 0.9, 0.1]])
SHAPES = torch.stack(
    [
        torch.ones(SQUARE, SQUARE),
        torch.eye(SQUARE) + torch.eye(SQUARE).flip(1) + torch.eye(SQUARE).roll(1, 1),
        (torch.arange(SQUARE) // 2 % 2).float().expand(SQUARE, SQUARE),
        (torch.arange(SQUARE) // 2 % 2).float()[:, None].expand(SQUARE, SQUARE),
    ]
).clamp(max=1)


def vit(**options: object) -> nn.Module:
    """Return a small Vision Transformer."""
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 64, "depth": 3, "num_heads": 4}
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", **(size | options))
    return made


class Halves(nn.Module):
    """A segmentation of pictures into halves, (B, 4, 1, 2), with a class token for each half."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(num_classes=4, reg_tokens=1, global_pool="", depth=2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of each half."""
        logits: Tensor = self.vit(images)[:, :2].mT[:, :, None]
        return logits


def gray(count: int, noise: float) -> Tensor:
    """Return gray pictures with noise, (count, 3, SIDE, SIDE)."""
    return MEAN + noise * torch.randn(count, 3, SIDE, SIDE)


def planted(pictures: Tensor, things: Tensor, corners: Tensor) -> None:
    """Draw an object into each picture, in place. Objects are (B, 3, SQUARE, SQUARE), NaN outside."""
    for picture, thing, (y, x) in zip(pictures, things, corners.tolist(), strict=True):
        place = picture[:, y : y + SQUARE, x : x + SQUARE]
        place.copy_(torch.where(thing.isnan(), place, thing))


def masks_of(corners: Tensor) -> Tensor:
    """Return masks of the squares with these corners (y, x), (B, SIDE, SIDE)."""
    boxes = torch.cat([corners.flip(1), corners.flip(1) + SQUARE], 1)
    return box_masks(boxes.float(), (SIDE, SIDE))


def places(side: int, count: int) -> Tensor:
    """Return random starts of squares along a side, aligned with patches, as the grid of maps is."""
    return torch.randint((side - SQUARE) // PATCH + 1, (count,)) * PATCH


def halves(count: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Draw a square of a random color into each half.

    Returns:
        Normalized pictures, the colors of both squares (count, 2), and the corners of both.
    """
    pictures, colors, corners = gray(count, NOISE), torch.randint(4, (count, 2)), []
    for half in (0, 1):
        rows, columns = places(SIDE, count), places(HALF_WIDTH, count) + half * HALF_WIDTH
        corners.append(torch.stack([rows, columns], 1))
        things = COLORS[colors[:, half], :, None, None].expand(-1, -1, SQUARE, SQUARE)
        planted(pictures, things, corners[-1])
    return (pictures - MEAN) / STD, colors, corners


def objects(count: int, which: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Draw two of 16 objects, (count, 2), into each picture, in two different quarters.

    Returns:
        Pictures, and the corners of both objects.
    """
    pictures, corners = gray(count, 0.1), []
    quarters = torch.rand(count, 4).argsort(1)[:, :2]
    for one in (0, 1):
        inside = torch.stack([places(SIDE // 2, count), places(SIDE // 2, count)], 1)
        at = torch.stack([quarters[:, one] // 2, quarters[:, one] % 2], 1) * SIDE // 2 + inside
        shape, color = SHAPES[which[:, one] // 4], COLORS[which[:, one] % 4]
        things = torch.where(shape[:, None] > 0, color[:, :, None, None], torch.nan)
        planted(pictures, things, at)
        corners.append(at)
    return pictures, corners


def trained(model: nn.Module, loss: Callable[[], Tensor], steps: int) -> nn.Module:
    """Train a model by a loss function, which runs it."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        found = loss()
        found.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"  step {step + 1}: loss {found.item():.3f}", flush=True)
    return model.eval()


def of_region(steps: int, count: int) -> None:
    """Train to classify each half by the color of its square, and explain the left half."""
    model = Halves()

    def loss() -> Tensor:
        pictures, colors, _ = halves(32)
        return F.cross_entropy(model(pictures)[:, :, 0], colors)

    trained(model, loss, steps)
    pictures, colors, corners = halves(count)
    with torch.no_grad():
        right = (model(pictures)[:, :, 0].argmax(1) == colors).float().mean()
    print(f"region: {right:.0%} of the halves have the right class")
    for method in METHODS:
        shares = []
        for cls in range(4):
            own = colors[:, 0] == cls
            target = region(cls, box=(0, 0, HALF_WIDTH, SIDE))
            found = vitx.explain(model, pictures[own], method, target=target).maps
            shares.append(torch.stack([energy_inside(found, masks_of(at[own])) for at in corners]))
        left, other = torch.cat(shares, 1).mean(1)
        print(f"  {method:12s} in the left square {left:.2f}, in the right one {other:.2f}", flush=True)


def of_similar(steps: int, count: int) -> None:
    """Train to tell whether pictures share an object, and explain pairs that share only one."""
    model = vit(num_classes=0)

    def loss() -> Tensor:
        which = torch.rand(64, 16).argsort(1)[:, :2]
        unit = F.normalize(model(objects(64, which)[0]), dim=1)
        shared = (which[:, None, :, None] == which[None, :, None]).flatten(2).any(2).float()
        off = ~torch.eye(64, dtype=torch.bool)
        return F.binary_cross_entropy_with_logits((SCALE * (unit @ unit.T - HALF))[off], shared[off])

    trained(model, loss, steps)
    which = torch.rand(count, 16).argsort(1)[:, :3]
    (first, at_first), (second, at_second) = (objects(count, which[:, [0, n]]) for n in (1, 2))
    apart = objects(count, which[:, [1, 2]].roll(1, 0))[0]
    with torch.no_grad():
        ours, theirs, others = (F.normalize(model(one), dim=1) for one in (first, second, apart))
    alike, unlike = (ours * theirs).sum(1), (ours * others).sum(1)
    print(f"similar: cosine {alike.mean():.2f} of pairs that share an object, {unlike.mean():.2f} of others")
    masks = torch.stack([masks_of(at_first[0]), masks_of(at_second[0])], 1).flatten(0, 1)
    for method in METHODS:
        found = vitx.explain(model, first, method, target=similar_to(second)).maps
        share = energy_inside(found, masks).mean()
        print(f"  {method:12s} on the object that they share {share:.2f}", flush=True)


def main() -> None:
    """Run both measurements."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=[400, 3000], help="steps of the two trainings")
    parser.add_argument("--count", type=int, default=100, help="number of pictures to explain")
    options = parser.parse_args()
    for measure, steps in zip((of_region, of_similar), options.steps, strict=True):
        torch.manual_seed(0)
        measure(steps, options.count)


if __name__ == "__main__":
    main()
