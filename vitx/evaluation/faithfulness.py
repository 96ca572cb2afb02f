"""Faithfulness and reliance: does the model need the patches that a map names more than random ones?"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.evaluation.perturbation import (
    Ask,
    Measure,
    asking,
    check,
    curve,
    expanded,
    mean_height,
    order,
    random_order,
    scoring,
)
from vitx.models.prediction import Target, target_classes

__all__ = ["faithfulness", "reliance"]

QUARTER = (0.25,)  # one pass for each map: a firing has no time for a whole curve
SHARE = 0.05  # of the patches
Maps = Mapping[str, Tensor]  # name -> (B, h, w)
T = TypeVar("T")


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
    """Compare deletion and insertion by each map with those by one random order of the same patches.

    Deletion takes the most relevant patches away, insertion keeps nothing else. Both are turned so that more
    is better: 0 is no better than chance, below 0 is worse. Of several fractions that are taken away, or
    kept, it is the mean of the curve.

    Maps are name -> (B, h, w). With `others`, `reliance` is measured, too. `whole` are the logits of the
    images, if they are known, and `first` is the place of the first image among all, if these are a part. All
    other arguments are those of `perturbation`.

    Returns:
        Name -> `deletion`, (B,): the score without random patches, minus that without the most relevant
        ones; and `insertion`, (B,): the score of the most relevant patches alone, minus that of random ones.
        In [-1, 1] except for target functions.

    Raises:
        VitxError: An argument is wrong.
    """
    check(model, images, maps.values(), fractions, measure, batch_size)
    kept = [1 - fraction for fraction in reversed(fractions)]
    nothing = expanded(0, images)
    with asking(model, images, batch_size) as ask:
        whole = ask() if whole is None else whole.to(images.device)
        score = scoring(target, measure, whole)

        def height(ranks: Tensor, gone: Sequence[float]) -> Tensor:
            return mean_height(curve(ask, whole, ranks, gone, score, nothing), gone)

        found: dict[str, dict[str, Tensor]] = {}
        random = _of_random(maps, lambda ranks: [height(ranks, gone) for gone in (fractions, kept)], first)
        for name, one in maps.items():
            without, alone = height(order(one, "most"), fractions), height(order(one, "least"), kept)
            by_chance = random[one.shape]
            found[name] = {"deletion": by_chance[0] - without, "insertion": alone - by_chance[1]}
        if others is not None:
            changed = _changed(ask, whole, maps, expanded(others, images), SHARE, first)
            found = {name: judged | {"reliance": changed[name]} for name, judged in found.items()}
    return found


def reliance(
    model: nn.Module,
    images: Tensor,
    maps: Maps,
    *,
    others: Tensor | None = None,
    share: float = SHARE,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Fill the brightest patches of each image with another image's, and count changed predictions.

    Those that as many random patches change are subtracted. Near 1 a few patches decide on the class: they
    may hold a shortcut, or a small object.

    Maps are name -> (B, h, w). `others`, (B, C, H, W), fill the images; by default the next image of which
    the model predicts another class, or the next one where it predicts the same of all. `share`, in (0, 1],
    is that of the patches that are filled; at least one is.

    Returns:
        Name -> (B,): -1, 0 or 1; the mean is the share of the predictions.

    Raises:
        VitxError: An argument is wrong.

    Example:
        >>> first = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 2, bias=False))
        >>> first[2].weight.data = torch.tensor([[1.0], [-1.0]]) * torch.eye(16)[0]
        >>> images = torch.tensor([1.0, -1.0])[:, None, None, None].expand(2, 1, 16, 16)
        >>> reliance(first, images, {"corner": torch.eye(16)[0].expand(2, 16).view(2, 4, 4)})
        {'corner': tensor([1., 1.])}
    """
    if not 0 < share <= 1:
        raise VitxError(f"share must be above 0 and at most 1, found {share}")
    check(model, images, maps.values(), (share,), "accuracy", batch_size)
    with asking(model, images, batch_size) as ask:
        whole = ask()
        others = expanded(images[of_another_class(whole)] if others is None else others, images)
        return _changed(ask, whole, maps, others, share)


def _changed(
    ask: Ask, whole: Tensor, maps: Maps, others: Tensor, share: float, first: int = 0
) -> dict[str, Tensor]:
    """Return where the brightest patches of others change the prediction, less where random ones do."""
    stays = scoring(None, "accuracy", whole)

    def kept(ranks: Tensor) -> Tensor:
        return stays(ask(ranks < max(1, round(share * ranks[0].numel())), others))

    random = _of_random(maps, kept, first)
    return {name: random[one.shape] - kept(order(one, "most")) for name, one in maps.items()}


def _of_random(maps: Maps, measured: Callable[[Tensor], T], first: int) -> dict[torch.Size, T]:
    """Return what is measured of a random order of the patches, once for all maps of one shape."""
    shaped = {one.shape: one for one in maps.values()}
    return {shape: measured(random_order(one, first)) for shape, one in shaped.items()}


def of_another_class(logits: Tensor) -> Tensor:
    """Return for each image the place of the next one with another prediction, (B,); else of the next.

    Example:
        >>> of_another_class(torch.eye(3)[[0, 0, 1]])
        tensor([2, 2, 0])
    """
    if len(logits) < 2:
        raise VitxError("reliance fills images with parts of others: give two or more")
    classes = target_classes(None, logits)
    if classes is None:
        raise VitxError(f"reliance is of predicted classes, found outputs of shape {tuple(logits.shape)}")
    places = torch.arange(len(classes), device=classes.device)
    ahead = (places - places[:, None] - 1) % len(classes)  # the image itself comes last
    return (ahead + len(classes) * (classes == classes[:, None])).argmin(1)
