"""Make the model random, layer by layer from the head down, and compare its maps with the original ones.

A map that stays the same does not show what the model has learned (Adebayo et al. 2018).

  vitx sanity cat.jpg dog.jpg bird.jpg --model deit_tiny_patch16_224
  vitx sanity photos/*.jpg --model my_package:MyLightningModule --weights last.ckpt --method grad_rollout

The table has Spearman's rank correlation, averaged over the pictures. The file shows the first of them.
"""

from typing import Any

import vitx
from vitx.attribution import with_options
from vitx.cli.folder import write_and_say
from vitx.cli.model import add_picture, load_subject
from vitx.cli.options import add
from vitx.errors import VitxError
from vitx.files import png_path
from vitx.inputs.reading import find_pictures


def add_options(command: Any) -> None:
    """Add the options of the command."""
    group = add_picture(command, "images", "image files; ten are enough", "vitx-sanity.png")
    add(group, "--method", "NAME", "methods (default: all fast ones that support the model)", nargs="+")
    add(group, "--seed", "N", "seed of the random weights", int, default=0)


def run(options: Any) -> int:
    """Run the command and return its exit status."""
    path = png_path(options.output)
    asked = with_options(options.method or "rollout")
    pictures = find_pictures(options.images)
    subject = load_subject(options, asked)
    if not subject.classes:
        raise VitxError("sanity makes the head random first, and this model has none: give the whole model")
    images, target = subject.batch(pictures), subject.find_class(options.target)
    found = vitx.sanity(subject.model, images, options.method, target=target, seed=options.seed)
    print(f"{found}\n")
    for method in found.maps:
        print(found.sentence(method))
    return write_and_say(path, found.picture(subject.prepare.mean, subject.prepare.std))
