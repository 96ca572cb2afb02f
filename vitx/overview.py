"""All maps of an explanation at once."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitx.attribution import title_of
from vitx.explanation import Explanation


def overview(
    explanation: Explanation,
    images: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    colormap: str = "inferno",
) -> NDArray[np.uint8]:
    """Draws what many pictures share: the mean map, and crops around the brightest patch.

    A shortcut is at one place in all pictures, or looks the same in all crops. That is a question, not a
    verdict: photographers centre their objects.

    Args:
        explanation: of some pictures.
        images: (B, C, H, W), those that were explained; by default the ones that are kept.
        class_names: by default ImageNet's for 1,000 classes, else the numbers.
        colormap: the name of a colour map of matplotlib.

    Returns:
        (height, width, 3) uint8: the mean map over all, and of each class up to ten (those with the most
        pictures), each over the mean picture; and 24 crops.

    Raises:
        VitxError: The images are not kept and not given, or are clips, volumes or spectrograms.
    """
    from vitx.models.classes import known_class_names, short
    from vitx.pictures.captions import captions_of, class_name, classes_of
    from vitx.pictures.overview import overview_of

    names = class_names
    if names is None and explanation.logits.ndim == 2:
        known = known_class_names(explanation.logits.shape[1])
        names = None if known is None else [short(name) for name in known]
    if explanation.target is not None:
        classes: list[str | None] = [class_name(one, names) for one in explanation.target.tolist()]
    else:
        classes = classes_of(captions_of(explanation.logits, class_names=names))
    title = title_of(explanation.method)
    return overview_of(explanation.pixels(images), explanation.maps, classes, colormap, title)
