"""Perturbation: the model is asked again about images of which patches are replaced."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vitx.errors import VitxError
from vitx.functional.tiles import full
from vitx.models.isolation import untouched
from vitx.models.prediction import Target, check_images, predict, scores, target_classes

__all__ = ["deletion", "insertion", "perturbation"]

Measure = Literal["probability", "sigmoid", "accuracy"]
Score = Callable[[Tensor], Tensor]  # logits, (B, ...) -> (B,)
# Runs the model on whole images, or with patches replaced, (B, h, w) bool, by a filling; returns its logits.
Ask = Callable[..., Tensor]
TENTHS = tuple(tenth / 10 for tenth in range(10))  # as Chefer et al. 2021, and the whole image


def deletion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """Return the mean score while the most relevant patches go first, (B,): lower is better.

    Petsiuk et al. 2018 (arXiv 1806.07421); Chefer et al. 2021 call it positive perturbation. By the
    trapezoidal rule; in [0, 1] except for target functions. Arguments: those of `perturbation`.
    """
    heights = perturbation(model, images, maps, first="most", **options)
    return mean_height(heights, options.get("fractions", TENTHS))


def insertion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """Return the mean score while the least relevant patches go first, (B,): higher is better.

    Chefer et al. 2021 call it negative perturbation. With fractions from 0 to 1 and read from its end, the
    curve is that of Petsiuk et al. 2018, in which the most relevant patches come back first (to a blurred
    image there: give it as `baseline`). Otherwise as `deletion`.
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
    """Measure the score while more and more patches of the images are replaced.

    The model is left as it was; it runs in eval mode meanwhile. A bar on the terminal shows the progress.

    Args:
        model: any that puts out logits.
        images: (B, C, H, W), as the model takes them, on its device.
        maps: (B, h, w). Each entry stands for a part of the image, as a patch does; equal ones go
            in a random order, the same for every image.
        first: the "most" or the "least" relevant patches go first.
        target: None for the predicted class of each image; a class; B classes; or a function from logits
            (b, ...) to scores (b,).
        fractions: of the patches that are replaced, ascending, in [0, 1].
        measure: of a class: its "probability" (softmax; of one logit, the sigmoid), "sigmoid" where an image
            has any number of classes, or "accuracy", 1 where it is predicted and else 0.
        baseline: replaces a patch: a number, or a tensor that broadcasts to the images. 0 is the mean
            colour of images that are normalised as usual.
        batch_size: images in one forward pass.

    Returns:
        (B, fractions): the measure, or the score of a target function.

    Raises:
        VitxError: An argument is wrong.
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
    """Yield an `Ask`; the model is left as it was. A bar waits for so many passes; 0: there is none."""
    shown = None if passes else True
    bar: Any = tqdm(total=len(images) * passes, desc="perturbation", unit="image", disable=shown, leave=False)

    def ask(replaced: Tensor | None = None, filling: Tensor = images) -> Tensor:
        found = []
        for part in (slice(at, at + batch_size) for at in range(0, len(images), batch_size)):
            seen = images[part].clone()  # some models write into their input
            if replaced is not None:
                mask = F.interpolate(replaced[part, None].float(), images.shape[2:], mode="nearest").bool()
                seen = torch.where(mask.to(images.device), filling[part], seen)
            found.append(full(predict(model, seen)))
            bar.update(len(seen))
        return torch.cat(found)

    with torch.no_grad(), untouched(model), bar:
        yield ask


def scoring(target: Target, measure: Measure, whole: Tensor) -> Score:
    """Return the measure of the target classes, which are those of the whole images."""
    classes = target_classes(target, whole)

    def score(logits: Tensor) -> Tensor:
        if classes is None:
            found = scores(target, logits, None)
            return found if found.is_floating_point() else found.float()
        if logits.ndim == 1 or logits.shape[1] == 1:  # one logit tells two classes apart
            logits = torch.stack([torch.zeros_like(logits.flatten()), logits.flatten()], 1)
        if measure == "accuracy":
            return (logits.argmax(1) == classes).to(logits.dtype)
        shares = logits.sigmoid() if measure == "sigmoid" else logits.softmax(1)
        return shares.gather(1, classes[:, None])[:, 0]

    return score


def curve(
    ask: Ask, whole: Tensor, ranks: Tensor, fractions: Sequence[float], score: Score, filling: Tensor
) -> Tensor:
    """Return the scores, (B, fractions), while patches are replaced by their ranks, (B, h, w)."""
    counts = [round(fraction * ranks[0].numel()) for fraction in fractions]
    return torch.stack([score(ask(ranks < n, filling) if n else whole) for n in counts], 1)


def order(maps: Tensor, first: str) -> Tensor:
    """Return the place of each patch in the order in which patches go, (B, h, w), from 0 on."""
    flat = maps.flatten(1)
    lot = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    patches = lot[flat[:, lot].argsort(dim=1, descending=first == "most", stable=True)]
    return patches.argsort(1).view_as(maps)


def random_order(maps: Tensor, first: int = 0) -> Tensor:
    """Return an order of the patches for each image, (B, h, w), drawn by its place, from `first` on."""
    seeds = (torch.Generator().manual_seed(first + place) for place in range(len(maps)))
    return torch.stack([torch.randperm(maps[0].numel(), generator=seed) for seed in seeds]).view_as(maps)


def mean_height(heights: Tensor, fractions: Sequence[float]) -> Tensor:
    """Return the mean height of each curve, (B,), by the trapezoidal rule; of one point, its height."""
    if len(fractions) == 1:
        return heights[:, 0]
    places = torch.tensor(fractions, dtype=heights.dtype, device=heights.device)
    return torch.trapezoid(heights, places) / (places[-1] - places[0])


def expanded(baseline: float | Tensor, images: Tensor) -> Tensor:
    """Return a baseline as a tensor of the shape of the images, or raise a VitxError."""
    try:
        return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    except (RuntimeError, TypeError, ValueError):
        found = f"shape {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else repr(baseline)
        raise VitxError(
            f"baseline must be a number, or a tensor that broadcasts to {tuple(images.shape)}, found {found}"
        ) from None


def check(
    model: nn.Module, images: Tensor, maps: Iterable[Tensor], fractions: Any, measure: str, batch_size: int
) -> None:
    """Raise a VitxError for arguments that do not fit together."""
    check_images(model, images)
    for one in maps:
        if not isinstance(one, Tensor):
            raise VitxError(f"maps must be a tensor (B, h, w), found {type(one).__name__}")
        if one.ndim != 3 or len(images) != len(one) or 0 in one.shape:
            raise VitxError(
                "images must be (B, C, H, W) and maps (B, h, w), one for each image, found "
                f"{tuple(images.shape)} and {tuple(one.shape)}"
            )
        if not one.isfinite().all():
            raise VitxError("the maps hold NaN or infinite values: no order of patches follows from them")
    if measure not in get_args(Measure):
        raise VitxError(f"measure must be one of {', '.join(get_args(Measure))}, found {measure!r}")
    shares: list[float] = []
    with suppress(TypeError, ValueError):
        shares = [float(fraction) for fraction in fractions]
    if not shares or shares != sorted({*shares}) or shares[0] < 0 or shares[-1] > 1:
        raise VitxError(f"fractions must be one or more in [0, 1], ascending, found {fractions!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise VitxError(f"batch_size must be a whole number of at least 1, found {batch_size!r}")
