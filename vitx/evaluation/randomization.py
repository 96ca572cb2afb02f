"""Sanity checks: the maps of a model are compared as its layers are randomized."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitx.attribution import Methods, find_method, title_of, with_options
from vitx.attribution import methods as all_methods
from vitx.errors import VitxError
from vitx.evaluation.metrics import rank_correlation
from vitx.evaluation.stages import find_stages
from vitx.explaining import explain_methods
from vitx.explanation import Explanation
from vitx.files import png_path, write_png
from vitx.inputs.prepared import Images
from vitx.models.prediction import Target
from vitx.pictures.captions import Caption
from vitx.pictures.render import Picture, grid, heatmaps, overlays

FOLLOWS, IN_PART, BLIND = "follows the model", "changes in part", "barely changes"
_SAME, _OTHER = 0.5**0.5, 0.1**0.5  # half, and a tenth, of the variance of the ranks is shared
# Added to the seed: a model that was trained from the same seed must not get its initial weights back.
_APART = 181003292
_SHOWN = 4  # stages in a picture
_TILE_WIDTH = 170
_NOTE = "correlation with the map as trained: 1 if it orders the patches alike, 0 if nothing is left of it"


@dataclass(frozen=True, eq=False)
class Sanity:
    """Correlations of maps with those of the intact model, as it is randomized; `print` shows a table.

    Attributes:
        stages: "head", "block N" to "block 1", "patch embedding", in the order of randomization.
        correlations: for each method, (stages, B): Spearman's rank correlation of the map with the intact
            model's, after each stage.
        maps: for each method, (stages, B, h, w), after each stage.
        intact: for each method, the explanations of the intact model.
        between_images: for each method, the mean correlation between the intact model's maps of different
            images; NaN for a single image.
        left_out: the methods that cannot explain the model, and why.
    """

    stages: tuple[str, ...]
    correlations: Mapping[str, Tensor]
    maps: Mapping[str, Tensor]
    intact: Mapping[str, Explanation]
    between_images: Mapping[str, float]
    left_out: Mapping[str, str]

    def final(self, method: str) -> float:
        """Return the mean correlation over the images once everything is randomized."""
        return self._means(method)[-1]

    def _means(self, method: str) -> list[float]:
        return [float(mean) for mean in self.correlations[method].mean(1)]

    def verdict(self, method: str) -> str:
        """Return a verdict on the final correlation, by the variance that the ranks share."""
        final = self.final(method)
        return BLIND if final >= _SAME else FOLLOWS if final < _OTHER else IN_PART

    def sentence(self, method: str) -> str:
        """Return the verdict as a sentence, with the numbers behind it."""
        said = f"{method} {self.verdict(method)}: the correlation with its maps as trained "
        if self.verdict(method) == BLIND:
            said += "is still"
        else:
            means = zip(self.stages, self._means(method), strict=True)
            said += f"falls below {_SAME:.2f} at {next(stage for stage, r in means if r < _SAME)!r}, and to"
        said += f" {_number(self.final(method))} when nothing learned is left"
        between = self.between_images[method]
        return said if isnan(between) else f"{said}; maps of different images correlate {_number(between)}"

    def __str__(self) -> str:
        means = {method: self._means(method) for method in self.correlations}
        rows = [("randomized down to", *means)]
        for index, stage in enumerate(self.stages):
            rows.append((stage, *(_number(mean[index]) for mean in means.values())))
        rows.append(("mean of all stages", *(_number(fmean(mean)) for mean in means.values())))
        rows.append(("different images", *(_number(self.between_images[method]) for method in means)))
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = ["  ".join((row[0].ljust(first), *map(str.rjust, row[1:], widths))).rstrip() for row in rows]
        lines += [f"{method} is left out: {reason}" for method, reason in self.left_out.items()]
        return "\n".join(lines)

    def picture(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Picture:
        """Draw the maps of the first image, as trained and after some stages, (height, width, 3) uint8.

        `mean` and `std` are those of the normalization, by default those that the model declares.
        """
        pixels = torch.cat([one[:1].pixels(mean=mean, std=std) for one in self.intact.values()])

        def drawn(maps: Iterable[Tensor]) -> Tensor:
            return overlays(pixels, heatmaps(torch.stack(list(maps)), (pixels.shape[1], pixels.shape[2])))

        columns = {"input": pixels, "as trained": drawn(each.maps[0] for each in self.intact.values())}
        shown = torch.linspace(0, len(self.stages) - 1, _SHOWN, device="cpu").round().int().unique().tolist()
        for index in shown:
            parts = dict.fromkeys((self.stages[0], self.stages[index]))
            title = f"random: {'everything' if index == len(self.stages) - 1 else ' to '.join(parts)}"
            columns[title] = drawn(maps[index, 0] for maps in self.maps.values())
        rows = []
        for method, found in self.correlations.items():
            falls = " \N{RIGHTWARDS ARROW} ".join(_number(found[index, 0].item()) for index in shown)
            rows.append(Caption(f"{title_of(method)}: {self.verdict(method)}, correlation {falls}"))
        return grid(columns, rows, tile_width=_TILE_WIDTH, note=_NOTE)

    def save(self, path: str | Path) -> None:
        """Write the picture as .png, or raise a VitxError."""
        write_png(png_path(path), self.picture())


def sanity(
    model: nn.Module,
    images: Images,
    methods: Methods | Sequence[str] | None = None,
    *,
    target: Target = None,
    seed: int = 0,
) -> Sanity:
    """Randomize a copy of a model from the head down, and compare its maps with those of the model.

    A map that looks the same for a model that has learned nothing does not show what the model has learned
    (Adebayo et al. 2018, arXiv 1810.03292, the cascading randomization). The converse does not hold: a map
    that changes may still be wrong.

    The head, the blocks and the patch embedding are randomized in this order, cumulatively, and after each
    stage the images are explained for the same classes. See `vitx.evaluation.stages.find_stages` for the
    parameters of each stage, and `randomize` for their new values. The model itself is not changed.

    Args:
        model: as for `vitx.explain`.
        images: as for `vitx.explain`, except for a DataLoader; about ten images give a stable mean.
        methods: names, or a mapping from names to options. By default all methods but those that take
            seconds per image, and those that cannot explain the model, which `left_out` lists.
        target: as for `vitx.explain`; None is the class that the intact model predicts.
        seed: the seed of the random weights, which determines the result.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_vit", img_size=64, num_classes=10)
        >>> found = sanity(model, torch.rand(2, 3, 64, 64), ["rollout"])
        >>> found.stages[:2], found.stages[-1], found.correlations["rollout"][0]
        (('head', 'block 6'), 'patch embedding', tensor([1., 1.]))
    """
    if isinstance(images, DataLoader):
        raise VitxError("sanity takes one batch of images, not a DataLoader: give its first batch")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise VitxError(f"seed must be a whole number from 0 to 2**63 - 1, found {seed!r}")
    fast = [name for name in all_methods() if not find_method(name).slow]
    asked = with_options(fast if methods is None else methods)
    with torch.inference_mode(False):
        intact, left_out = _intact(model, images, asked, target, named=methods is not None)
        first = next(iter(intact.values()))
        pixels, logits = first.images, first.logits
        assert pixels is not None, "they are kept unless they come from a DataLoader"
        if target is None and logits.ndim == 2:
            target = logits.argmax(1)
        try:
            other = copy.deepcopy(model)
        except Exception as error:  # of any kind, as modules may hold anything
            said = str(error).split("\n")[0]
            refusal = f"the model cannot be copied, and sanity does not change the original: {said}"
            raise VitxError(refusal) from error
        stages = dict(reversed(find_stages(other, pixels).items()))
        generator = torch.Generator().manual_seed(seed + _APART)
        each = []
        left = {name: asked[name] for name in intact}
        for tensors in tqdm(stages.values(), "randomizing", unit="stage", disable=None):
            randomize(tensors, generator)
            each.append(explain_methods(other, pixels, left, target=target))
    maps = {name: torch.stack([found[name].maps for found in each]).cpu() for name in intact}
    correlations = {
        name: torch.stack([rank_correlation(one, intact[name].maps) for one in of_stages])
        for name, of_stages in maps.items()
    }
    between = {name: _between_images(explanation.maps) for name, explanation in intact.items()}
    return Sanity(tuple(stages), correlations, maps, intact, between, left_out)


@torch.no_grad()
def randomize(tensors: Iterable[Tensor], generator: torch.Generator) -> None:
    """Redraw parameters in place from a normal distribution with their own mean and standard deviation.

    The original initialization is unknown, and may not fit the other layers (a layer scale of 1e-5 turns its
    block off); with these moments, nothing overflows. A tensor of equal values keeps them. The running
    statistics of BatchNorm, which are not of type `nn.Parameter` and whose variance must not be negative, are
    set to their mean. The generator is on the CPU, so that all devices draw the same values.
    """
    for tensor in tensors:
        values = tensor.float()
        std = values.std(correction=0) if isinstance(tensor, nn.Parameter) else 0
        noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.device)
        tensor.copy_(values.mean() + std * noise)


def _intact(
    model: nn.Module, images: Images, asked: Methods, target: Target, named: bool
) -> tuple[dict[str, Explanation], dict[str, str]]:
    """Explain by all methods if they were named, otherwise by those that work; return why others do not."""
    if named:
        return explain_methods(model, images, asked, target=target), {}
    found: dict[str, Explanation] = {}
    refused: dict[str, str] = {}
    for name in asked:
        try:
            found |= explain_methods(model, images, {name: asked[name]}, target=target)
        except VitxError as error:
            refused[name] = str(error)
    if not found:
        raise VitxError(next(iter(refused.values())))
    return found, refused


def _between_images(maps: Tensor) -> float:
    shifted = [rank_correlation(maps, maps.roll(shift, 0)) for shift in range(1, len(maps))]
    return torch.stack(shifted).mean().item() if shifted else nan


def _number(value: float) -> str:
    """Format a number with two decimals, without a minus sign for zero; empty for NaN."""
    return "" if isnan(value) else f"{round(value, 2) + 0.0:.2f}"
