"""Rings around patches, and what a legend says of them."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitx.pictures.marks import BOX
from vitx.pictures.render import PAPER, scaled_up

SINKS = "rings: patches that most others attend to whatever they look for, no evidence (sinks)"
_WIDE = 224  # pixels: in narrower pictures, lines are coarse


def ringed(pictures: Tensor, marks: Tensor) -> Tensor:
    """Draws a thin ring around each marked patch.

    Args:
        pictures: (B, H, W, 3) uint8.
        marks: (B, h, w) bool.

    Returns:
        (B, H, W, 3) uint8, or a whole multiple of H and W.
    """
    drawn = []
    for picture, mask in zip(scaled_up(pictures.cpu(), _WIDE), marks.cpu(), strict=True):
        canvas = Image.fromarray(picture.numpy())
        draw = ImageDraw.Draw(canvas)
        high, wide = canvas.height / mask.shape[0], canvas.width / mask.shape[1]
        for row, column in mask.nonzero().tolist():
            box = (column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1)
            draw.ellipse(box, outline=PAPER, width=3)
            draw.ellipse([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=BOX, width=1)
        drawn.append(torch.from_numpy(np.array(canvas)))
    return torch.stack(drawn)
