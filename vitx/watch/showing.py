"""What a firing shows: the numbers, and the picture with its captions."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitx.attribution import telling, title_of
from vitx.evaluation.metrics import drift, energy_inside, entropy, information, pointing_game
from vitx.explanation import Explanation
from vitx.models.outputs import Kind
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of, class_name, classes_of
from vitx.pictures.overview import overview_of
from vitx.pictures.views import Layer, laid_out, slices_of
from vitx.runs.saved import FRAMES_IN_A_CARD
from vitx.targets import Question
from vitx.watch.explaining import Target
from vitx.watch.images import Samples
from vitx.watch.keeping import Look

_CARD = 350 - 2 * render.GAP  # pixels in TensorBoard, of a strip


def measure(
    found: Mapping[str, Explanation], masks: Tensor | None, before: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns the scalars of each method, as means over the images.

    Args:
        found: the explanation of each method, by its name.
        masks: (n, h, w), True on the object, or None.
        before: the maps of each method at the firing before.

    Returns:
        Tag -> value: `entropy`, `information` if there are several images, `drift` if there was a firing
        before, `pointing` and `energy` if there are masks, see `vitx.metrics`; and of rollout `sinks`, the
        share of the map on such patches, see `Explanation.sinks`.
    """
    scalars: dict[str, float] = {}
    for name, explanation in found.items():
        maps = explanation.maps
        values = {"entropy": entropy(maps)}
        if len(maps) > 1:
            values["information"] = information(maps)
        if name in before and before[name].shape == maps.shape:
            values["drift"] = drift(maps, before[name])
        if masks is not None:
            values["pointing"] = pointing_game(maps, masks)
            values["energy"] = energy_inside(maps, masks)
        if name == "rollout" and explanation.sinks is not None:
            values["sinks"] = (maps * explanation.sinks).flatten(1).sum(1) / maps.flatten(1).sum(1)
        scalars |= {f"vitx/{name}/{key}": value.mean().item() for key, value in values.items()}
    return scalars


def captions(
    found: Mapping[str, Explanation],
    samples: Samples,
    class_names: Sequence[str] | None,
    kind: Kind | None,
    places: Sequence[int],
) -> list[Caption]:
    """Says what was predicted of the images at some places, and whether it is right."""
    one, shown = next(iter(found.values())), list(places)
    labels = None if samples.labels is None else samples.labels[shown]
    if one.captions is not None:
        return [Caption(one.captions[image]) for image in shown]
    return captions_of(one.logits[shown], labels, class_names, kind)


def draw(
    found: Mapping[str, Explanation],
    samples: Samples,
    pixels: Tensor,
    said: Sequence[Caption],
    colormap: str,
    note: str = "",
) -> NDArray[np.uint8]:
    """Draws the grid of the images shown: the input and each method's overlay.

    Args:
        found: the explanation of each method, by its name, of all samples.
        samples: the images with what is known of them.
        pixels: the images shown, (n, H, W, 3) uint8, or frame by frame, (n, T, H, W, 3).
        said: the caption of each.
        colormap: the name of a colour map of matplotlib.
        note: is written below.

    Returns:
        (height, width, 3) uint8.
    """
    shown = list(samples.shown)
    of_one = next(iter(found.values()))
    size = tuple(pixels.shape[1:-1])
    channels = None if of_one.channels is None else samples.images.shape[of_one.channels]
    slices = slices_of(size, channels, most_frames=FRAMES_IN_A_CARD)
    layers = {
        title_of(name): Layer(one.maps, one.signed, sinks=one.sinks).at(shown) for name, one in found.items()
    }
    columns, marks = laid_out(pixels, layers, slices, colormap)
    note = "; ".join(filter(None, (note, marks)))
    width = render.TILE_WIDTH if slices is None else _CARD
    return render.grid(columns, said, colormap=colormap, note=note, tile_width=width)


def draw_overview(
    found: Mapping[str, Explanation],
    samples: Samples,
    look: Look,
    kind: Kind | None,
) -> NDArray[np.uint8]:
    """Draws the maps of all images at once, shown or not, by the first method that is about a class."""
    name = telling(found)
    pixels = look.colors.draw(samples.images, found[name].channels)
    said = captions(found, samples, look.class_names, kind, range(len(samples)))
    return overview_of(pixels, found[name].maps, classes_of(said), look.colormap, title_of(name))


def about(target: Target, class_names: Sequence[str] | None, kind: Kind | None = "class") -> str:
    """Says what the maps are about, where it is not the class that the captions name first."""
    if target == "predicted":
        of_number = dict.fromkeys(("numbers", "shares"), "maps of the number")
        return {"classes": "maps of the likeliest class", **of_number}.get(kind or "", "")
    if target == "label":
        return "maps of the true class"
    if target == "caption":
        return "maps of each image's own caption"
    if isinstance(target, Question):
        return ""  # the captions tell
    if isinstance(target, int):
        return f"maps of {class_name(target, class_names)}"
    return "maps of your own score"
