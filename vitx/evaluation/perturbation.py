"""Perturbation: the scores of a model as more and more patches of the images are replaced."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitx.errors import VitxError, shown
from vitx.functional.tiles import full
from vitx.models.isolation import untouched
from vitx.models.prediction import Target, check_images, predict, scores, target_classes

__all__ = ["deletion", "insertion", "perturbation"]

Measure = Literal["probability", "sigmoid", "accuracy"]
Score = Callable[[Tensor], Tensor]  # logits, (B, ...) -> (B,)
# Runs the model on the whole images, or with patches, (B, h, w) bool, replaced by a filling; returns logits.
Ask = Callable[..., Tensor]
TENTHS = tuple(tenth / 10 for tenth in range(10))  # as in Chefer et al. 2021, plus the whole image


def deletion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """Return the mean score, (B,), as patches are replaced, most relevant first: lower is better.

    See Petsiuk et al. 2018 (arXiv 1806.07421). Chefer et al. 2021 call it positive perturbation. The mean is
    trapezoidal, and in [0, 1] except for target functions. The arguments are those of `perturbation`.
    """
    heights = perturbation(model, images, maps, first="most", **options)
    return mean_height(heights, options.get("fractions", TENTHS))


def insertion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """Return the mean score, (B,), as patches are replaced, least relevant first: higher is better.

    Chefer et al. 2021 call it negative perturbation. With fractions from 0 to 1, the reversed curve is that
    of Petsiuk et al. 2018, where the most relevant patches are inserted first (there into a blurred image,
    which you can pass as `baseline`). Otherwise, it is like `deletion`.
    """
    heights = perturbation(model, images, maps, first="least", **options)
    return mean_height(heights, options.get("fractions", TENTHS))


def perturbation(
    model: nn.Module,
    images: Tensor,
    maps: Tensor,
    *,
    first: Literal["most", "least"],
    target: Target = None,
    fractions: Sequence[float] = TENTHS,
    measure: Measure = "probability",
    baseline: float | Tensor = 0.0,
    batch_size: int = 32,
) -> Tensor:
    """Measure the score as more and more patches of the images are replaced.

    The model runs in eval mode; its state is restored. A terminal shows a progress bar.

    Args:
        model: any model that returns logits.
        images: (B, C, H, W), preprocessed for the model and on its device.
        maps: (B, h, w), one entry for each patch. Equal entries are replaced in a random order, the same for
            every image.
        first: whether the "most" or the "least" relevant patches are replaced first.
        target: as for `vitx.explain`, but none of `vitx.targets`.
        fractions: the shares of patches to replace, in [0, 1] and ascending.
        measure: the score of a class: its "probability" (softmax, or sigmoid of a single logit), "sigmoid"
            for multi-label models, or "accuracy", 1 if the class is predicted and 0 otherwise.
        baseline: the replacement: a number, or a tensor that broadcasts to the images.
        batch_size: the number of images per forward pass.

    Returns:
        (B, fractions): the measure, or the score of a target function.
    """
    check(model, images, [maps], fractions, measure, batch_size)
    if first not in ("most", "least"):
        raise VitxError(f'first must be "most" or "least", found {first!r}')
    filling, ranks = expanded(baseline, images), order(maps, first)
    with asking(model, images, batch_size, 1 + len(fractions) - (fractions[0] == 0)) as ask:
        whole = ask()
        return curve(ask, whole, ranks, fractions, scoring(target, measure, whole), filling)


@contextmanager
def asking(model: nn.Module, images: Tensor, batch_size: int, passes: int = 0) -> Iterator[Ask]:
    """Yield an `Ask`, and restore the model. A progress bar expects `passes` passes; 0 for no bar."""
    shown = None if passes else True
    bar: Any = tqdm(total=len(images) * passes, desc="perturbation", unit="image", disable=shown, leave=False)

    def ask(replaced: Tensor | None = None, filling: Tensor = images) -> Tensor:
        found = []
        for part in (slice(at, at + batch_size) for at in range(0, len(images), batch_size)):
            seen = images[part].clone()  # some models modify their input
            if replaced is not None:
                mask = F.interpolate(replaced[part, None].float(), images.shape[2:], mode="nearest").bool()
                seen = torch.where(mask.to(images.device), filling[part], seen)
            found.append(full(predict(model, seen)))
            bar.update(len(seen))
        return torch.cat(found)

    with torch.no_grad(), untouched(model), bar:
        yield ask


def scoring(target: Target, measure: Measure, whole: Tensor) -> Score:
    """Return a function from logits to scores; `whole`, the logits of the images, gives the classes."""
    classes = target_classes(target, whole)

    def score(logits: Tensor) -> Tensor:
        if classes is None:
            found = scores(target, logits, None)
            return found if found.is_floating_point() else found.float()
        if logits.ndim == 1 or logits.shape[1] == 1:  # a single logit stands for two classes
            logits = torch.stack([torch.zeros_like(logits.flatten()), logits.flatten()], 1)
        if measure == "accuracy":
            return (logits.argmax(1) == classes).to(logits.dtype)
        shares = logits.sigmoid() if measure == "sigmoid" else logits.softmax(1)
        return shares.gather(1, classes[:, None])[:, 0]

    return score


def curve(
    ask: Ask, whole: Tensor, ranks: Tensor, fractions: Sequence[float], score: Score, filling: Tensor
) -> Tensor:
    """Return the scores, (B, fractions), as patches are replaced in the order of `ranks`, (B, h, w)."""
    counts = [round(fraction * ranks[0].numel()) for fraction in fractions]
    return torch.stack([score(ask(ranks < n, filling) if n else whole) for n in counts], 1)


def order(maps: Tensor, first: str) -> Tensor:
    """Return the rank of each patch in the order of replacement, (B, h, w), from 0 on."""
    flat = maps.flatten(1)
    seed = torch.Generator().manual_seed(0)
    lot = torch.randperm(flat.shape[1], generator=seed, device="cpu").to(flat.device)
    patches = lot[flat[:, lot].argsort(dim=1, descending=first == "most", stable=True)]
    return patches.argsort(1).view_as(maps)


def random_order(maps: Tensor, first: int = 0) -> Tensor:
    """Return random ranks of the patches, (B, h, w), seeded by the index of each image, from `first` on."""
    seeds = (torch.Generator().manual_seed(first + place) for place in range(len(maps)))
    ranks = [torch.randperm(maps[0].numel(), generator=seed, device="cpu") for seed in seeds]
    return torch.stack(ranks).view_as(maps)


def mean_height(heights: Tensor, fractions: Sequence[float]) -> Tensor:
    """Return the mean height of each curve, (B,), by the trapezoidal rule; a single point is its own mean."""
    if len(fractions) == 1:
        return heights[:, 0]
    places = torch.tensor(fractions, dtype=heights.dtype, device=heights.device)
    return torch.trapezoid(heights, places) / (places[-1] - places[0])


def expanded(baseline: float | Tensor, images: Tensor) -> Tensor:
    """Expand a baseline to the shape of the images, or raise a VitxError."""
    try:
        return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    except (RuntimeError, TypeError, ValueError):
        wanted = f"a number, or a tensor that broadcasts to {tuple(images.shape)}"
        raise VitxError(f"baseline must be {wanted}, found {shown(baseline)}") from None


def check(
    model: nn.Module, images: Tensor, maps: Iterable[Tensor], fractions: Any, measure: str, batch_size: int
) -> None:
    """Raise a VitxError if an argument is invalid, or if images and maps do not match."""
    check_images(model, images)
    for one in maps:
        if not isinstance(one, Tensor):
            raise VitxError(f"maps must be a tensor (B, h, w), found {shown(one)}")
        if one.ndim != 3 or len(images) != len(one) or 0 in one.shape:
            found = f"{tuple(images.shape)} and {tuple(one.shape)}"
            raise VitxError(f"images must be (B, C, H, W) and maps (B, h, w), one for each, found {found}")
        if not one.isfinite().all():
            raise VitxError("the maps hold NaN or infinite values, which give no order of the patches")
    if measure not in get_args(Measure):
        raise VitxError(f"measure must be one of {', '.join(get_args(Measure))}, found {measure!r}")
    shares: list[float] = []
    with suppress(TypeError, ValueError):
        shares = [float(fraction) for fraction in fractions]
    if not shares or shares != sorted({*shares}) or shares[0] < 0 or shares[-1] > 1:
        raise VitxError(f"fractions must be one or more in [0, 1], ascending, found {fractions!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise VitxError(f"batch_size must be a whole number of at least 1, found {batch_size!r}")
