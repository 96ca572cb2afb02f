"""Explains the watched images, each rank its share of them."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from vitx.callbacks import ranks
from vitx.callbacks.images import Samples
from vitx.callbacks.subject import Forward, with_forward
from vitx.errors import VitxError
from vitx.explain import explain_methods
from vitx.explanation import Explanation, join
from vitx.isolation import untouched

_BATCH = 32  # images explained at once

Target = str | int | Callable[[Tensor], Tensor]


def explain_samples(
    trainer: pl.Trainer,
    model: nn.Module,
    samples: Samples,
    methods: Mapping[str, Mapping[str, Any]],
    target: Target = "predicted",
    forward_fn: Forward | None = None,
) -> dict[str, Explanation]:
    """Explains all samples; called by all ranks.

    Args:
        trainer: knows the ranks and the precision.
        model: what is explained.
        samples: the images with what is known of them.
        methods: the options of each method, by its name.
        target: "predicted", "label", a class, or a function from logits to scores.
        forward_fn: a function from (model, images) to logits; by default the model's own forward.

    Returns:
        The explanation of each method, by its name, on the CPU; the same on every rank.

    Raises:
        VitxError: The input is wrong, or the model is none that can be explained, on any of the ranks.
    """

    def explain_share() -> list[dict[str, Explanation]]:
        share = ranks.share(trainer, len(samples))
        starts = range(share.start, share.stop, _BATCH)
        return [explain_part(slice(start, min(start + _BATCH, share.stop))) for start in starts]

    def explain_part(part: slice) -> dict[str, Explanation]:
        device = next(model.parameters(), samples.images).device
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        with trainer.precision_plugin.forward_context():
            found = explain_methods(
                with_forward(model, forward_fn, inputs),
                samples.images[part].to(device),
                methods,
                target=_of_core(target, samples, part),
            )
        return {name: explanation.cpu() for name, explanation in found.items()}

    with untouched(model):
        ranks.take_buffers_of_first(trainer, model)
        parts = [part for of_rank in ranks.from_all(trainer, explain_share) for part in of_rank]
    return {name: join([part[name] for part in parts]) for name in methods}


def _of_core(target: Target, samples: Samples, part: slice) -> Any:
    """Says the target as `vitx.explain` takes it."""
    if target != "label":
        return None if target == "predicted" else target
    if samples.labels is None or samples.labels.ndim != 1:
        raise VitxError('target="label" needs a class for each image: give a data set of (image, class)')
    return samples.labels[part]
