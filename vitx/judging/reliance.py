"""Reliance: how often a few bright patches of another picture change what the model predicts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.judging.perturbation import check, curves, order, random_order
from vitx.models.isolation import untouched
from vitx.models.prediction import check_images, predict, target_classes

SHARE = 0.05  # of the patches


def reliance(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    others: Tensor | None = None,
    share: float = SHARE,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Fills the brightest patches of each image with another image's, and counts changed predictions.

    Those that as many random patches change are subtracted. Near 1 a few patches decide on the class: they
    may hold a shortcut, or a small object.

    Args:
        model: as for `vitx.metrics.deletion`.
        images: (B, C, H, W), as the model takes them.
        maps: name -> (B, h, w), all of one grid.
        others: (B, C, H, W), what fills each image; by default the next image of which the model predicts
            another class, or the next one where it predicts the same of all.
        share: of the patches that are filled, in (0, 1]; at least one is.
        batch_size: images in one forward pass.

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
    check_images(model, images)
    if not 0 < share <= 1:
        raise VitxError(f"share must be above 0 and at most 1, found {share}")
    for one in maps.values():
        check(images, one, "most", (0, share), "accuracy", batch_size)
    if others is None:
        parts = images.split(batch_size)
        with torch.no_grad(), untouched(model):
            logits = torch.cat([predict(model, part.clone()) for part in parts])
        others = images[of_another_class(logits)]
    by_chance = {one.shape[1:]: random_order(one) for one in maps.values()}
    orders = [*(order(one, "most") for one in maps.values()), *by_chance.values()]
    fewest = min(one[0].numel() for one in maps.values())
    found = curves(
        *(model, images, orders),
        fractions=(max(share, 1 / fewest),),
        measure="accuracy",
        baseline=others,
        batch_size=batch_size,
    )
    stays = [curve[:, 0] for curve in found]
    random = dict(zip(by_chance, stays[len(maps) :], strict=True))
    return {name: random[maps[name].shape[1:]] - stay for name, stay in zip(maps, stays, strict=False)}


def of_another_class(logits: Tensor) -> Tensor:
    """Returns for each image the place of the next one with another prediction, (B,); else of the next.

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
