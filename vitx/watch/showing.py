"""The display of a firing: numbers, the picture with its captions, and the message of the first one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitx.attribution import telling, title_of
from vitx.evaluation.metrics import drift, energy_inside, entropy, information, pointing_game
from vitx.explanation import Explanation
from vitx.models.outputs import Kind
from vitx.pictures.captions import Caption, captions_of, class_name, classes_of
from vitx.pictures.colors import Colors
from vitx.pictures.drawing import draw_layers
from vitx.pictures.overview import overview_of
from vitx.pictures.render import GAP, TILE_WIDTH, Picture
from vitx.pictures.views import Layer, slices_of
from vitx.runs.saved import FRAMES_IN_A_CARD
from vitx.targets import Question
from vitx.watch.images import Samples
from vitx.watch.settings import TargetOption

_CARD = 350 - 2 * GAP  # width of a strip in TensorBoard, in pixels


@dataclass(frozen=True)
class Firing:
    """The results of one firing, the same on every rank."""

    step: int
    samples: Samples
    found: Mapping[str, Explanation]  # by the name of the method, for all samples
    kind: Kind | None  # of the output
    numbers: Mapping[str, float]  # tag -> value

    @property
    def first(self) -> Explanation:
        """The explanation of the first method."""
        return next(iter(self.found.values()))


@dataclass(frozen=True)
class Display:
    """The images as they are shown, and the text around them."""

    pixels: Tensor  # of the images shown, (n, H, W, 3) uint8, or with frames, (n, T, H, W, 3)
    colors: Colors  # in which these and the other images are drawn
    class_names: Sequence[str] | None  # in the order of the logits
    colormap: str  # of the overlays, as named in matplotlib
    note: str  # written below each grid
    hints: Sequence[str]  # on what is missing, reported at the first firing


def measure(
    found: Mapping[str, Explanation], masks: Tensor | None, before: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return the scalars of each method, tag -> mean over the images; see docs/training.md."""
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


def captions(firing: Firing, names: Sequence[str] | None, places: Sequence[int]) -> list[Caption]:
    """Return captions of the images at some places: the prediction, and whether it is right."""
    one, chosen = firing.first, list(places)
    labels = None if firing.samples.labels is None else firing.samples.labels[chosen]
    if one.captions is not None:
        return [Caption(one.captions[image]) for image in chosen]
    return captions_of(one.logits[chosen], labels, names, firing.kind)


def draw(firing: Firing, display: Display) -> Picture:
    """Draw the grid of the images shown, (height, width, 3): the input and each method's overlay."""
    pixels, one, shown = display.pixels, firing.first, list(firing.samples.shown)
    channels = None if one.channels is None else firing.samples.images.shape[one.channels]
    slices = slices_of(tuple(pixels.shape[1:-1]), channels, most_frames=FRAMES_IN_A_CARD)
    layers = {
        title_of(name): Layer(found.maps, found.signed, sinks=found.sinks).at(shown)
        for name, found in firing.found.items()
    }
    said, width = captions(firing, display.class_names, shown), TILE_WIDTH if slices is None else _CARD
    return draw_layers(pixels, layers, said, slices, (display.note,), display.colormap, tile_width=width)


def draw_overview(firing: Firing, display: Display) -> Picture:
    """Draw the maps of all images, shown or not, by the first method that explains a class, if any."""
    name = telling(firing.found)
    found, images = firing.found[name], firing.samples.images
    said = captions(firing, display.class_names, range(len(images)))
    pixels = display.colors.draw(images, found.channels)
    return overview_of(pixels, found.maps, classes_of(said), display.colormap, title_of(name))


def about(target: TargetOption, class_names: Sequence[str] | None, kind: Kind | None = "class") -> str:
    """Return what the maps explain; empty if it is the class that the captions name first."""
    if target == "predicted":
        of_number = dict.fromkeys(("numbers", "shares"), "maps of the number")
        return {"classes": "maps of the likeliest class", **of_number}.get(kind or "", "")
    if target == "label":
        return "maps of the true class"
    if target == "caption":
        return "maps of each image's own caption"
    if isinstance(target, Question):
        return ""  # the captions name it
    if isinstance(target, int):
        return f"maps of {class_name(target, class_names)}"
    return "maps of your own score"


def first_words(firing: Firing, display: Display, kept: Path | None, places: Sequence[str]) -> str:
    """Return a message: what was found and how, what is missing, and where maps (`kept`) and pictures are."""
    samples, names = firing.samples, display.class_names
    of = f" of {samples.source}" if samples.source else ""
    images = f"{len(samples)} images{of}"
    if samples.out_of is not None:
        images = f"{len(samples)} of {samples.out_of:,} images{of}"
    elif samples.stream:
        images = f"the first {images} (a stream, so no others can be chosen)"
    colors, known = str(display.colors).removeprefix("colors "), firing.kind in ("class", "classes")
    facts = {
        "methods": ", ".join(map(title_of, firing.found)),
        "class names": f"{len(names) if names else 'none'}" if known else "",
        "colors": colors,
        "pictures": ", ".join(map(path_of, places)) or "none",
        "maps": path_of(kept) if kept else "",
    }
    said = [f"{name}: {fact}" for name, fact in facts.items() if fact]
    return f"watches {'; '.join((images, *samples.found, *said, *display.hints))}"


def path_of(path: str | Path) -> str:
    """Return a path for messages: relative if it is below the working directory, else absolute."""
    whole, here = Path(path).absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)
