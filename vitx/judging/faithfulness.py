"""Faithfulness: whether the model needs the patches that a map names more than patches taken at random."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from vitx.judging.perturbation import Measure, check, curves, mean_height, order, random_order
from vitx.models.prediction import Target, check_images

FEW = (0.0, 0.25, 0.75)  # a firing has no time for more, and most maps are told from chance by these


def faithfulness(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    *,
    target: Target = None,
    fractions: Sequence[float] = FEW,
    measure: Measure = "probability",
    batch_size: int = 32,
) -> dict[str, dict[str, Tensor]]:
    """Compares deletion and insertion by each map with those by one random order of the same patches.

    Both are turned so that more is better: 0 is no better than chance, below 0 is worse.

    Args:
        model: as for `vitx.metrics.deletion`.
        images: (B, C, H, W), as the model takes them.
        maps: name -> (B, h, w), all of one grid.
        target: as for `vitx.metrics.deletion`.
        fractions: of the patches that are gone.
        measure: as for `vitx.metrics.deletion`.
        batch_size: images in one forward pass.

    Returns:
        Name -> `deletion`, (B,): that by a random order less that by the map; and `insertion`, (B,): that by
        the map less that by the random order. In [-1, 1] but for target functions.

    Raises:
        VitxError: An argument is wrong.
    """
    check_images(model, images)
    names = list(maps)
    for one in maps.values():
        check(images, one, "most", fractions, measure, batch_size)
    chance = {one.shape[1:]: random_order(one) for one in maps.values()}
    orders = [order(maps[name], first) for name in names for first in ("most", "least")]
    found = curves(
        *(model, images, [*orders, *chance.values()]),
        target=target,
        fractions=fractions,
        measure=measure,
        batch_size=batch_size,
    )
    heights = [mean_height(curve, fractions) for curve in found]
    by_chance = dict(zip(chance, heights[len(orders) :], strict=True))
    pairs = zip(names, heights[0 : len(orders) : 2], heights[1 : len(orders) : 2], strict=True)
    return {
        name: {
            "deletion": by_chance[maps[name].shape[1:]] - gone_first,
            "insertion": gone_last - by_chance[maps[name].shape[1:]],
        }
        for name, gone_first, gone_last in pairs
    }
