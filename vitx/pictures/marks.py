"""What is drawn onto pictures of maps: a box, and words where a map alone would mislead."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitx.metrics import entropy
from vitx.pictures.render import PAPER, STAMPED, scaled_up, stamp

UNIFORM = 0.99  # of the entropy
BOX = "#00b3a4"  # the outline of what a target is about


def say_uniform(drawn: Tensor, maps: Tensor, signed: Tensor | None = None) -> Tensor:
    """Stamps pictures, (B, H, W, 3) uint8, of nearly uniform maps, of which scaling makes blotches.

    And those in which all speaks against the score: its map shows what does so the least.
    """
    said = ["nearly uniform" if one else "" for one in (entropy(maps) > UNIFORM).tolist()]
    if signed is not None:
        against = all_against(signed).tolist()
        said = ["all against" if one else word for one, word in zip(against, said, strict=True)]
    return stamp(drawn, said) if any(said) else drawn


def all_against(signed: Tensor) -> Tensor:
    """Returns in which maps, (B, ...), some patches speak against the score, and none for it, (B,)."""
    values = signed.flatten(1)
    return (values.amax(1) <= 0) & (values.amin(1) < 0)


def outlined(pictures: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Draws a box into each picture.

    Small pictures, in which lines would be coarse, are scaled up.

    Args:
        pictures: (B, H, W, 3) uint8.
        boxes: (B, 4): x0, y0, x1, y1 in an image of the given size.
        size: height and width of the image.

    Returns:
        (B, H, W, 3) uint8, or a whole multiple of H and W.
    """
    drawn = []
    for picture, box in zip(scaled_up(pictures.cpu(), STAMPED), boxes.tolist(), strict=True):
        canvas = Image.fromarray(picture.numpy())
        scale = (canvas.width / size[1], canvas.height / size[0]) * 2
        edges = [canvas.width - 1, canvas.height - 1] * 2
        corners = [min(max(0, at * by), edge) for at, by, edge in zip(box, scale, edges, strict=True)]
        line = max(2, canvas.width // 112)
        draw = ImageDraw.Draw(canvas)
        draw.rectangle(corners, outline=PAPER, width=line + 2)
        inside = [corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1]
        if inside[0] < inside[2] and inside[1] < inside[3]:
            draw.rectangle(inside, outline=BOX, width=line)
        drawn.append(torch.from_numpy(np.array(canvas)))
    return torch.stack(drawn)
