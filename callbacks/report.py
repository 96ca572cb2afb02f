"""What a firing shows: the numbers, and the picture."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitx import metrics, render
from vitx.callbacks.images import Samples
from vitx.explanation import Explanation


def measure(
    found: Mapping[str, Explanation], masks: Tensor | None, before: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns the scalars of each method, as means over the images.

    Args:
        found: the explanation of each method, by its name.
        masks: (n, h, w), True on the object, or None.
        before: the maps of each method at the firing before.

    Returns:
        Tag -> value: `entropy`, `border` (share on the outermost patches), `drift` if there was a firing
        before, `pointing` and `energy` if there are masks; see `vitx.metrics`.
    """
    scalars: dict[str, float] = {}
    for name, explanation in found.items():
        maps = explanation.maps
        values = {"entropy": metrics.entropy(maps), "border": metrics.border_share(maps)}
        if name in before and before[name].shape == maps.shape:
            values["drift"] = metrics.drift(maps, before[name])
        if masks is not None:
            values["pointing"] = metrics.pointing_game(maps, masks)
            values["energy"] = metrics.energy_inside(maps, masks)
        scalars |= {f"vitx/{name}/{key}": value.mean().item() for key, value in values.items()}
    return scalars


def draw(
    found: Mapping[str, Explanation],
    samples: Samples,
    normalisation: tuple[Sequence[float], Sequence[float]],
    class_names: Sequence[str] | None,
    colormap: str,
) -> NDArray[np.uint8]:
    """Draws the grid of the images shown: the input and each method's overlay.

    Args:
        found: the explanation of each method, by its name, of all samples.
        samples: the images with what is known of them.
        normalisation: mean and std of the images.
        class_names: by default those of the data set.
        colormap: the name of a colour map of matplotlib.

    Returns:
        (height, width, 3) uint8.
    """
    shown = list(samples.shown)
    pixels = render.to_pixels(samples.images[shown], *normalisation)
    columns = {"input": pixels}
    for name, explanation in found.items():
        heat = render.heatmaps(explanation.maps[shown], explanation.image_size)
        columns[render.TITLES.get(name, name)] = render.overlays(pixels, heat, colormap)
    logits = next(iter(found.values())).logits[shown]
    labels = None if samples.labels is None else samples.labels[shown]
    captions = render.captions(logits, labels, class_names or samples.class_names)
    return render.grid(columns, captions, colormap=colormap)
