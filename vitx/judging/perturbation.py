"""Whether a model needs what a map says it looks at: patches are taken away, and the model is asked again."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitx.errors import VitxError
from vitx.functional.tiles import full
from vitx.models.isolation import untouched
from vitx.models.prediction import Target, check_images, predict, scores, target_classes

Measure = Literal["probability", "accuracy"]
TENTHS = tuple(tenth / 10 for tenth in range(10))  # Chefer's, and the whole image


def deletion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """What is left of the score while the most relevant patches go first: lower is better.

    Petsiuk et al. 2018 (arXiv 1806.07421); Chefer et al. 2021 call it positive perturbation.

    Args:
        model: as for `perturbation`.
        images: as for `perturbation`.
        maps: as for `perturbation`.
        **options: of `perturbation`.

    Returns:
        (B,): the mean height of each curve, by the trapezoidal rule; in [0, 1] but for target functions.
    """
    return _mean_height(perturbation(model, images, maps, first="most", **options), options)


def insertion(model: nn.Module, images: Tensor, maps: Tensor, **options: Any) -> Tensor:
    """What is left of the score while the least relevant patches go first: higher is better.

    Chefer et al. 2021 call it negative perturbation. With fractions from 0 to 1 and read from its end, the
    curve is that of Petsiuk et al. 2018, in which the most relevant patches come back first (to a blurred
    image there: give it as `baseline`).

    Args:
        model: as for `perturbation`.
        images: as for `perturbation`.
        maps: as for `perturbation`.
        **options: of `perturbation`.

    Returns:
        (B,): the mean height of each curve, by the trapezoidal rule; in [0, 1] but for target functions.
    """
    return _mean_height(perturbation(model, images, maps, first="least", **options), options)


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
    """Follows what the model says while more and more patches of the images are taken away.

    The model is left as it was; it runs in eval mode meanwhile. A bar on the terminal shows the progress.

    Args:
        model: any that puts out logits.
        images: (B, C, H, W), as the model takes them, on its device.
        maps: (B, h, w). Each entry stands for a part of the image, as a patch does; equal ones go
            in a random order, the same for every image.
        first: whether the "most" or the "least" relevant patches go first.
        target: what is followed: None for the predicted class of each image; a class; B classes; or a
            function from logits (b, ...) to scores (b,), which is called for each batch.
        fractions: of the patches that are gone, ascending, in [0, 1].
        measure: of a class: its "probability" (softmax), or "accuracy", 1 where it is predicted and else 0.
        baseline: what is seen where a patch was, a number or what broadcasts to the images. 0 is the mean
            colour of images that are normalised as usual.
        batch_size: images in one forward pass.

    Returns:
        (B, fractions): the measure, or the score of a target function.

    Raises:
        VitxError: An argument is wrong.
    """
    check_images(model, images)
    _check(images, maps, first, fractions, measure, batch_size)
    fractions = [float(fraction) for fraction in fractions]
    ranks = _ranks(maps.flatten(1), largest=first == "most").view_as(maps)
    replaced = _expanded(baseline, images)
    counts = [round(fraction * maps[0].numel()) for fraction in fractions]  # of patches that are gone
    curves = []
    with torch.no_grad(), untouched(model), _progress(len(images) * (1 + sum(map(bool, counts)))) as progress:
        parts = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        whole = torch.cat(
            [_asked(model, images[part].clone(), progress) for part in parts]
        )  # some models write
        classes = target_classes(target, whole)
        for part in parts:
            found = []
            for count in counts:
                logits = whole[part]
                if count:
                    gone = _scaled(ranks[part] < count, images)
                    logits = _asked(model, torch.where(gone, replaced[part], images[part]), progress)
                found.append(_score(target, logits, None if classes is None else classes[part], measure))
            curves.append(torch.stack(found, 1))
    return torch.cat(curves)


def _asked(model: nn.Module, images: Tensor, progress: Any) -> Tensor:
    logits = predict(model, images)
    progress.update(len(images))
    return full(logits)


def _expanded(baseline: float | Tensor, images: Tensor) -> Tensor:
    try:
        return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
    except (RuntimeError, TypeError, ValueError):
        found = f"shape {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else repr(baseline)
        raise VitxError(
            f"baseline must be a number, or a tensor that broadcasts to {tuple(images.shape)}, found {found}"
        ) from None


def _ranks(flat: Tensor, largest: bool) -> Tensor:
    """The place of each entry in its row, in descending or ascending order."""
    lot = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    order = lot[flat[:, lot].argsort(dim=1, descending=largest, stable=True)]
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _scaled(gone: Tensor, images: Tensor) -> Tensor:
    """Scales a mask of patches to the images, (b, 1, H, W)."""
    return F.interpolate(gone[:, None].float(), images.shape[2:], mode="nearest").bool().to(images.device)


def _score(target: Target, logits: Tensor, classes: Tensor | None, measure: Measure) -> Tensor:
    if classes is None:
        found = scores(target, logits, None)
        return found if found.is_floating_point() else found.float()
    if measure == "accuracy":
        return (logits.argmax(1) == classes).to(logits.dtype)
    return logits.softmax(1).gather(1, classes[:, None])[:, 0]


def _mean_height(curves: Tensor, options: dict[str, Any]) -> Tensor:
    fractions = torch.tensor(options.get("fractions", TENTHS), dtype=curves.dtype, device=curves.device)
    return torch.trapezoid(curves, fractions) / (fractions[-1] - fractions[0])


def _progress(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="perturbation", unit="image", disable=None, leave=False)


def _check(
    images: Tensor, maps: Tensor, first: str, fractions: Sequence[float], measure: str, batch_size: int
) -> None:
    if not isinstance(maps, Tensor):
        raise VitxError(f"maps must be a tensor (B, h, w), found {type(maps).__name__}")
    if maps.ndim != 3 or len(images) != len(maps) or 0 in maps.shape:
        raise VitxError(
            "images must be (B, C, H, W) and maps (B, h, w), one for each image, found "
            f"{tuple(images.shape)} and {tuple(maps.shape)}"
        )
    if not maps.isfinite().all():
        raise VitxError("the maps hold NaN or infinite values: no order of patches follows from them")
    if first not in ("most", "least"):
        raise VitxError(f'first must be "most" or "least", found {first!r}')
    if measure not in get_args(Measure):
        raise VitxError(f"measure must be one of {', '.join(get_args(Measure))}, found {measure!r}")
    try:
        shares = [float(fraction) for fraction in fractions]
    except (TypeError, ValueError):
        shares = []
    rising = all(low < high for low, high in pairwise(shares))
    if len(shares) < 2 or not rising or shares[0] < 0 or shares[-1] > 1:
        raise VitxError(f"fractions must be two or more in [0, 1], ascending, found {fractions!r}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise VitxError(f"batch_size must be a whole number of at least 1, found {batch_size!r}")
