"""Whether the model needs what the maps of a firing name, as numbers of each image."""

from collections.abc import Mapping

from torch import Tensor, nn

from vitx.judging.faithfulness import faithfulness
from vitx.judging.perturbation import Measure
from vitx.judging.reliance import reliance
from vitx.models.prediction import Target


def judge(
    model: nn.Module,
    images: Tensor,
    *,
    target: Target,
    maps: Mapping[str, Tensor],
    measure: Measure,
    others: Tensor | None,
    batch_size: int,
) -> dict[str, Tensor]:
    """Measures faithfulness, and reliance where there are images of other classes to fill in.

    Returns:
        `METHOD/deletion`, `METHOD/insertion` and `METHOD/reliance`, (B,) each, on the CPU.
    """
    options = {"maps": maps, "batch_size": batch_size}
    found = faithfulness(model, images, target=target, measure=measure, **options)  # type: ignore[arg-type]
    if others is not None:
        changed = reliance(model, images, others=others.to(images), **options)  # type: ignore[arg-type]
        found = {name: judged | {"reliance": changed[name]} for name, judged in found.items()}
    return {
        f"{name}/{kind}": values.float().cpu()
        for name, judged in found.items()
        for kind, values in judged.items()
    }
