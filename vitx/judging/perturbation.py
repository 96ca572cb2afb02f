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

Measure = Literal["probability", "sigmoid", "accuracy"]
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
    curve = perturbation(model, images, maps, first="most", **options)
    return mean_height(curve, options.get("fractions", TENTHS))


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
    curve = perturbation(model, images, maps, first="least", **options)
    return mean_height(curve, options.get("fractions", TENTHS))


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
        measure: of a class: its "probability" (softmax; of one logit, the sigmoid), "sigmoid" where an image
            has any number of classes, or "accuracy", 1 where it is predicted and else 0.
        baseline: what is seen where a patch was, a number or what broadcasts to the images. 0 is the mean
            colour of images that are normalised as usual.
        batch_size: images in one forward pass.

    Returns:
        (B, fractions): the measure, or the score of a target function.

    Raises:
        VitxError: An argument is wrong.
    """
    check_images(model, images)
    check(images, maps, first, fractions, measure, batch_size)
    (curve,) = curves(
        model,
        images,
        [order(maps, first)],
        target=target,
        fractions=fractions,
        measure=measure,
        baseline=baseline,
        batch_size=batch_size,
        progress=True,
    )
    return curve


def curves(
    model: nn.Module,
    images: Tensor,
    orders: Sequence[Tensor],
    *,
    target: Target = None,
    fractions: Sequence[float],
    measure: Measure = "probability",
    baseline: float | Tensor = 0.0,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Tensor]:
    """Follows the model in several orders of the patches; the whole images are asked for once.

    Args:
        model: as for `perturbation`.
        images: as for `perturbation`.
        orders: as `order` returns them, (B, h, w) each.
        target: as for `perturbation`.
        fractions: as for `perturbation`.
        measure: as for `perturbation`.
        baseline: as for `perturbation`.
        batch_size: as for `perturbation`.
        progress: whether a bar on the terminal shows it.

    Returns:
        (B, fractions) for each order.
    """
    replaced = _expanded(baseline, images)
    passes = 1 + sum(round(fraction * ranks[0].numel()) > 0 for ranks in orders for fraction in fractions)
    with torch.no_grad(), untouched(model), _progress(len(images) * passes, progress) as bar:
        parts = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
        whole = torch.cat([_asked(model, images[part].clone(), bar) for part in parts])  # some models write
        classes = target_classes(target, whole)

        def height(part: slice, ranks: Tensor, fraction: float) -> Tensor:
            count, logits = round(fraction * ranks[0].numel()), whole[part]
            if count:
                gone = _scaled(ranks[part] < count, images)
                logits = _asked(model, torch.where(gone, replaced[part], images[part]), bar)
            return _score(target, logits, None if classes is None else classes[part], measure)

        return [
            torch.cat([torch.stack([height(part, ranks, f) for f in fractions], 1) for part in parts])
            for ranks in orders
        ]


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


def order(maps: Tensor, first: Literal["most", "least"]) -> Tensor:
    """Returns the place of each patch in the order in which patches go, (B, h, w), from 0 on."""
    flat = maps.flatten(1)
    lot = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(0)).to(flat.device)
    sorted_ = lot[flat[:, lot].argsort(dim=1, descending=first == "most", stable=True)]
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(sorted_)
    return torch.empty_like(sorted_).scatter_(1, sorted_, places).view_as(maps)


def random_order(maps: Tensor) -> Tensor:
    """Returns a random order of the patches of each image, the same ones in every call."""
    return order(torch.rand(maps.shape, generator=torch.Generator().manual_seed(0)), "most").to(maps.device)


def _scaled(gone: Tensor, images: Tensor) -> Tensor:
    """Scales a mask of patches to the images, (b, 1, H, W)."""
    return F.interpolate(gone[:, None].float(), images.shape[2:], mode="nearest").bool().to(images.device)


def _score(target: Target, logits: Tensor, classes: Tensor | None, measure: Measure) -> Tensor:
    if classes is None:
        found = scores(target, logits, None)
        return found if found.is_floating_point() else found.float()
    if logits.ndim == 1 or logits.shape[1] == 1:  # one logit tells two classes apart
        logits = torch.stack([torch.zeros_like(logits.flatten()), logits.flatten()], 1)
    if measure == "accuracy":
        return (logits.argmax(1) == classes).to(logits.dtype)
    shares = logits.sigmoid() if measure == "sigmoid" else logits.softmax(1)
    return shares.gather(1, classes[:, None])[:, 0]


def mean_height(curve: Tensor, fractions: Sequence[float]) -> Tensor:
    """Returns the mean height of each curve, (B,), by the trapezoidal rule."""
    places = torch.tensor(fractions, dtype=curve.dtype, device=curve.device)
    return torch.trapezoid(curve, places) / (places[-1] - places[0])


def _progress(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="perturbation", unit="image", disable=None if shown else True, leave=False)


def check(
    images: Tensor, maps: Tensor, first: str, fractions: Sequence[float], measure: str, batch_size: int
) -> None:
    """Raises a VitxError for what does not fit together."""
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
