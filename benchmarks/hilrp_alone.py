"""The package hilrp, in a process of its own: it changes timm's classes for good.

    python hilrp_alone.py QUESTION ANSWER

QUESTION is a file of (model, images, classes), ANSWER is where the maps (B, H, W) go.
"""

import sys

import hilrp
import torch


def main(question: str, answer: str) -> None:
    """Explains one image at a time, as hilrp does."""
    model, images, classes = torch.load(question, weights_only=False)  # from the process that asks
    pairs = zip(images.split(1), classes, strict=True)
    maps = [hilrp.attribute(model, image, target=target)["pixel_map"] for image, target in pairs]
    torch.save(torch.stack(maps), answer)
    print("{}")  # no error


if __name__ == "__main__":
    main(*sys.argv[1:])
