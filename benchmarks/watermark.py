"""Maps of a shortcut in a public model, which takes a Chinese watermark for a carton.

    pip install -e ".[bench]"
    python benchmarks/watermark.py --photographs FOLDER --weights FILE

Public ImageNet models do so (Li et al. 2023, arXiv 2212.04825). Each photograph of the folder is squashed to
the size of the model, and the text is drawn across its middle. First come the probability of carton
without and with it, and how many predictions change. Then come the maps for carton of two sets of pictures:
those that become cartons, and those with the highest probability of carton.

- energy: the share of the map in the box of the text
- pointing: how often the center of the brightest patch lies there
- passes: the time relative to a forward pass

In brackets: the 95 % confidence interval of the mean, by the bootstrap.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from faithfulness import Data, explain_all, interval, normalized
from matplotlib.ft2font import FT2Font
from measuring import first_line
from PIL import Image, ImageDraw, ImageFont
from showing import set_apart, table
from torch import Tensor, nn
from tqdm import tqdm
from truth_cases import CONTENDERS, on_grid

import vitx
from vitx.errors import VitxError
from vitx.inputs.prepared import preprocessing_of
from vitx.inputs.reading import find_pictures, read_picture
from vitx.metrics import energy_inside, pointing_game
from vitx.models.checkpoints import model_of_weights
from vitx.models.classes import find_class, known_class_names, short

MODEL = "deit_tiny_patch16_224"
TEXT = "捷径" * 3  # "shortcut", three times
ASKED = [
    *(f"vitx {method}" for method in vitx.methods()),
    "vitx grad_rollout, plain gradient",
    "vitx gae, plain gradient",
    "torchxai-explain, attribution",
    "pytorch-grad-cam, Grad-CAM",
    "hilrp",
]
BATCH = 50


@dataclass(frozen=True)
class Watermark:
    """A white text across the middle of a picture.

    Attributes:
        font: a font file with all letters of the text.
        text: the text to draw.
        at: the start of its line, as shares of the picture's width and height.
        size: the font size, as a share of the picture's height.
        opacity: in [0, 1].

    Raises:
        VitxError: The font lacks a letter.
    """

    font: Path
    text: str = TEXT
    at: tuple[float, float] = (2 / 224, 89 / 224)
    size: float = 36 / 224
    opacity: float = 0.5

    def __post_init__(self) -> None:
        if not self.font.is_file():
            raise VitxError(f"there is no font {self.font}")
        if missing := sorted(set(self.text) - set(map(chr, FT2Font(str(self.font)).get_charmap()))):
            raise VitxError(f"the font {self.font} lacks {' '.join(missing)}: name another")

    def box(self, picture: Image.Image) -> tuple[int, ...]:
        """Return the box of the text: x0, y0, x1, y1 in pixels.

        Raises:
            VitxError: The picture is too small for the text.
        """
        left, top = self._corner(picture)
        inked = self._font(picture).getbbox(self.text)
        box = tuple(round(at) for at in (left + inked[0], top + inked[1], left + inked[2], top + inked[3]))
        if box[2] > picture.width or box[3] > picture.height:
            raise VitxError(
                f"the text needs {box[2]} x {box[3]} pixels, and the picture has {picture.width} x "
                f"{picture.height}: take a smaller size"
            )
        return box

    def on(self, picture: Image.Image) -> Image.Image:
        """Draw the text onto a copy of an RGB picture."""
        self.box(picture)
        ink, font = Image.new("L", picture.size), self._font(picture)
        ImageDraw.Draw(ink).text(self._corner(picture), self.text, round(255 * self.opacity), font)
        return Image.composite(Image.new("RGB", picture.size, "white"), picture, ink)

    def _font(self, picture: Image.Image) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(self.font), round(self.size * picture.height))

    def _corner(self, picture: Image.Image) -> tuple[int, int]:
        """Return the start of the line of text, in pixels."""
        return round(self.at[0] * picture.width), round(self.at[1] * picture.height)


def packaged_font() -> Path:
    """Return a Chinese font that a package ships: Noto Serif SC, under the Open Font License."""
    from pylopdf_fonts_zh_cn import serif_path

    found: Path = serif_path()
    return found


@dataclass(frozen=True)
class Found:
    """The measurements of a contender.

    Attributes:
        energy: one value for each picture.
        pointing: one value for each picture.
        passes: the time relative to a forward pass.
        error: the reason if there are none.
    """

    energy: Tensor = field(default_factory=lambda: torch.zeros(0))
    pointing: Tensor = field(default_factory=lambda: torch.zeros(0))
    passes: float = 0.0
    error: str = ""


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """Return the probabilities of all classes, (B, classes)."""
    parts = tqdm(images.split(BATCH), "predicting", disable=None, leave=False)
    return torch.cat([model(part).softmax(1) for part in parts])


def model_of(name: str, weights: Path | None) -> nn.Module:
    """Create the model, with timm's own weights if no file is given."""
    made = timm.create_model(name, pretrained=True) if weights is None else model_of_weights(name, weights)
    return made.eval()


def drawn_on(
    photographs: Sequence[Path], watermark: Watermark, model: nn.Module, target: int
) -> tuple[Tensor, Data]:
    """Return the prepared photographs without the text, and with it and masks of its box."""
    prepare = preprocessing_of(model)
    height, width = prepare.size
    plain, marked = [], []
    for path in tqdm(photographs, "reading", disable=None):
        squashed = read_picture(path).resize((width, height), Image.Resampling.BICUBIC)
        plain.append(normalized(squashed, prepare))
        marked.append(normalized(watermark.on(squashed), prepare))
    box = torch.tensor([watermark.box(squashed)])
    masks = vitx.metrics.box_masks(box.float(), (height, width)).expand(len(plain), -1, -1)
    return torch.stack(plain), Data(torch.stack(marked), torch.full((len(plain),), target), masks)


def report_change(before: Tensor, after: Tensor, target: int, names: Sequence[str]) -> None:
    """Print how the text changes the predictions."""
    name, rises = names[target], (after - before).mean(0)
    most = int(rises.argmax())
    becomes = (after.argmax(1) == target).float().mean() - (before.argmax(1) == target).float().mean()
    changed = (after.argmax(1) != before.argmax(1)).float().mean()
    print(f"{len(before)} photographs; mean probability of {name}: ", end="")
    print(f"{before[:, target].mean():.4f} without the text, {after[:, target].mean():.4f} with it")
    print(f"probability that rises most: {names[most]} ({rises[most]:+.4f})")
    print(f"predictions that change: {changed:.1%}; that become {name}: {becomes:.1%}")


def measured(contender: Callable[..., Any], model: nn.Module, data: Data) -> Found:
    """Explain each picture by a contender; if it fails, return its error."""
    try:
        maps, _, passes = explain_all(contender, model, data)
    except Exception as error:
        return Found(error=first_line(error))
    maps = on_grid(maps, model)
    return Found(energy_inside(maps, data.masks), pointing_game(maps, data.masks), passes)


def with_interval(values: Sequence[float]) -> str:
    """Return the mean of values and its confidence interval."""
    low, high = interval(values)
    return f"{mean(values):.2f} ({low:.2f}–{high:.2f})"


def table_of(found: Mapping[str, Found], sets: Mapping[str, Tensor]) -> str:
    """Return the table, sorted by decreasing energy in the first set."""
    head = ["", *(f"{title}: {key}" for title in sets for key in ("energy", "pointing")), "passes"]
    first = next(iter(sets.values()))
    lines = []
    for name, one in sorted(found.items(), key=lambda item: -float(item[1].energy[first].mean())):
        values = [each[chosen].tolist() for chosen in sets.values() for each in (one.energy, one.pointing)]
        lines.append([set_apart(name), *map(with_interval, values), f"{one.passes:.1f}"])
    return table(head, lines)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights (default: timm's own)")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="a timm model for ImageNet-1k")
    parser.add_argument("--font", type=Path, metavar="FILE", help="default: that of pylopdf-fonts-zh-cn")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--size", type=float, default=Watermark.size, help="font size over picture height")
    parser.add_argument("--opacity", type=float, default=Watermark.opacity)
    parser.add_argument("--target", default="carton", metavar="CLASS", help="class that the maps explain")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="size of the second set")
    parser.add_argument("--only", nargs="+", default=ASKED, choices=list(CONTENDERS), metavar="NAME")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # those of peers
    try:
        watermark = Watermark(
            options.font or packaged_font(), options.text, size=options.size, opacity=options.opacity
        )
        model = model_of(options.model, options.weights)
        names = [short(name) for name in known_class_names(1000) or ()]
        target = find_class(options.target, 1000, names)
        plain, data = drawn_on(find_pictures([options.photographs]), watermark, model, target)
    except (VitxError, ImportError) as error:
        parser.error(str(error))
    before, after = probabilities(model, plain), probabilities(model, data.images)
    report_change(before, after, target, names)
    becomes = (after.argmax(1) == target) & (before.argmax(1) != target)
    likely = after[:, target].topk(min(options.count, len(after))).indices
    asked = torch.cat([becomes.nonzero()[:, 0], likely]).unique()
    sets = {"become one": torch.isin(asked, becomes.nonzero()), "the most likely": torch.isin(asked, likely)}
    sets = {f"{title} ({int(one.sum())})": one for title, one in sets.items() if one.any()}
    print(f"the text's box is {data.masks[0].float().mean():.2f} of a picture", flush=True)
    found = {}
    for name in options.only:
        found[name] = measured(CONTENDERS[name], model, data.part(asked))
        print(name, found[name].error or f"{found[name].energy.mean():.3f}", flush=True)
    print()
    print(table_of({name: one for name, one in found.items() if not one.error}, sets))


if __name__ == "__main__":
    main()
