# /// script
# requires-python = ">=3.11.11"
# dependencies = ["hilrp==0.2.0", "timm", "torch", "transformers<5"]
# ///
"""The package hilrp, in its own environment and process, as it changes timm's classes permanently.

    uv run hilrp_alone.py QUESTION ANSWER

QUESTION is a file with (model, images, classes, threads), and ANSWER the file for the maps, (B, H, W). uv
creates the environment, as hilrp needs a newer Python than vitx and an older transformers.
"""

import sys

import hilrp
import torch


def main(question: str, answer: str) -> None:
    """Explain one image at a time, as hilrp requires."""
    model, images, classes, threads = torch.load(question, weights_only=False)  # from the parent process
    torch.set_num_threads(threads)
    pairs = zip(images.split(1), classes, strict=True)
    maps = [hilrp.attribute(model, image, target=target)["pixel_map"] for image, target in pairs]
    torch.save(torch.stack(maps), answer)
    print("{}")  # no error


if __name__ == "__main__":
    main(*sys.argv[1:])
