"""Faithfulness and reliance: how much more the model needs the patches of a map than random ones."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.evaluation import perturbation
from vitx.evaluation.perturbation import Ask, Measure
from vitx.models.prediction import Target, target_classes

__all__ = ["faithfulness", "reliance"]

QUARTER = (0.25,)  # one pass per map and curve: a callback has no time for more points
SHARE = 0.05  # of the patches
Maps = Mapping[str, Tensor]  # name -> (B, h, w)


def faithfulness(
    model: nn.Module,
    images: Tensor,
    maps: Maps,
    *,
    target: Target = None,
    fractions: Sequence[float] = QUARTER,
    measure: Measure = "probability",
    batch_size: int = 32,
    others: Tensor | None = None,
    whole: Tensor | None = None,
    first: int = 0,
) -> dict[str, dict[str, Tensor]]:
    """Compare deletion and insertion in the order of each map with a random order of the same patches.

    `maps` maps names to (B, h, w). With `others`, `reliance` is measured as well. `whole` holds the logits of
    the images, if they are known. `first` is the index of the first image among all, if these are a part; it
    seeds the random orders. All other arguments are those of `perturbation`.

    Returns:
        For each name, `deletion`, (B,), the score without random patches minus the score without the most
        relevant ones, and `insertion`, (B,), the score of the most relevant patches alone minus the score of
        random ones: 0 is no better than chance, and higher is better. With several fractions to remove, or
        to keep, they are means over the curve.
    """
    perturbation.check(model, images, maps.values(), fractions, measure, batch_size)
    kept = [1 - fraction for fraction in reversed(fractions)]
    nothing = perturbation.expanded(0, images)
    with perturbation.asking(model, images, batch_size) as ask:
        whole = ask() if whole is None else whole.to(images.device)
        score = perturbation.scoring(target, measure, whole)

        def height(ranks: Tensor, gone: Sequence[float]) -> Tensor:
            heights = perturbation.curve(ask, whole, ranks, gone, score, nothing)
            return perturbation.mean_height(heights, gone)

        found = {
            "deletion": _beyond_chance(maps, lambda ranks: -height(ranks, fractions), "most", first),
            "insertion": _beyond_chance(maps, lambda ranks: height(ranks, kept), "least", first),
        }
        if others is not None:
            others = perturbation.expanded(others, images)
            found["reliance"] = _changed(ask, whole, maps, others, SHARE, first)
    return {name: {key: of_all[name] for key, of_all in found.items()} for name in maps}


def reliance(
    model: nn.Module,
    images: Tensor,
    maps: Maps,
    *,
    others: Tensor | None = None,
    share: float = SHARE,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Replace the brightest patches of each image with another image's, and count changed predictions.

    Changes caused by the same number of random patches are subtracted. If the mean is near 1, a few patches
    decide the class: they may show a shortcut, or a small object.

    `maps` maps names to (B, h, w). `others`, (B, C, H, W), holds the replacements: by default, the next image
    with another predicted class, or simply the next image if all have the same. `share`, in (0, 1], is the
    share of patches to replace, at least one.

    Returns:
        For each name, (B,) with values -1, 0 or 1; the mean is a share of the predictions.
    """
    if not 0 < share <= 1:
        raise VitxError(f"share must be above 0 and at most 1, found {share}")
    perturbation.check(model, images, maps.values(), (share,), "accuracy", batch_size)
    with perturbation.asking(model, images, batch_size) as ask:
        whole = ask()
        others = perturbation.expanded(images[of_another_class(whole)] if others is None else others, images)
        return _changed(ask, whole, maps, others, share)


def _changed(
    ask: Ask, whole: Tensor, maps: Maps, others: Tensor, share: float, first: int = 0
) -> dict[str, Tensor]:
    """Return which predictions change with the brightest patches replaced, minus those with random ones."""
    stays = perturbation.scoring(None, "accuracy", whole)

    def changed(ranks: Tensor) -> Tensor:
        return 1 - stays(ask(ranks < max(1, round(share * ranks[0].numel())), others))

    return _beyond_chance(maps, changed, "most", first)


def _beyond_chance(maps: Maps, gain: Callable[[Tensor], Tensor], gone: str, first: int) -> dict[str, Tensor]:
    """Return the gain from each map's ranks minus that from random ranks, drawn once per shape of maps."""
    shapes = {one.shape: one for one in maps.values()}
    chance = {shape: gain(perturbation.random_order(one, first)) for shape, one in shapes.items()}
    return {name: gain(perturbation.order(one, gone)) - chance[one.shape] for name, one in maps.items()}


def of_another_class(logits: Tensor) -> Tensor:
    """Return for each image the index of the next one with another prediction, else of the next one, (B,)."""
    if len(logits) < 2:
        raise VitxError("reliance replaces patches with those of other images: give two or more")
    classes = target_classes(None, logits)
    if classes is None:
        raise VitxError(f"reliance needs predicted classes, found outputs of shape {tuple(logits.shape)}")
    places = torch.arange(len(classes), device=classes.device)
    ahead = (places - places[:, None] - 1) % len(classes)  # the image itself comes last
    return (ahead + len(classes) * (classes == classes[:, None])).argmin(1)
