"""Explains the watched images, each rank its share of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from vitx.callbacks import ranks
from vitx.callbacks.images import Samples
from vitx.callbacks.subject import Forward, by_any_way, ways_to_call
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
) -> tuple[dict[str, Explanation], dict[str, Exception]]:
    """Explains all samples; called by all ranks. A method that fails takes no other with it.

    Args:
        trainer: knows the ranks and the precision.
        model: what is explained.
        samples: the images with what is known of them.
        methods: the options of each method, by its name.
        target: "predicted", "label", a class, or a function from logits to scores.
        forward_fn: a function from (model, images) to logits; by default the model's own forward.

    Returns:
        The explanation of each method, by its name, on the CPU, the same on every rank; and the error of each
        that failed, on any of the ranks.
    """

    def explain_share(methods: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Explanation]]:
        share = ranks.share(trainer, len(samples))
        starts = range(share.start, share.stop, _BATCH)
        return [explain_part(methods, slice(start, min(start + _BATCH, share.stop))) for start in starts]

    def explain_part(methods: Mapping[str, Mapping[str, Any]], part: slice) -> dict[str, Explanation]:
        device = next(model.parameters(), samples.images).device
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        with trainer.precision_plugin.forward_context():
            images, wanted = samples.images[part].to(device), _of_core(target, samples, part)
            found = by_any_way(
                ways_to_call(model, forward_fn, samples.name, inputs),
                lambda way: explain_methods(way, images, methods, target=wanted),
            )
        return {name: explanation.cpu() for name, explanation in found.items()}

    def explain_by(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, Explanation]:
        of_ranks = ranks.from_all(trainer, partial(explain_share, methods))
        parts = [part for of_rank in of_ranks for part in of_rank]
        return {name: join([part[name] for part in parts]) for name in methods}

    with untouched(model):
        ranks.take_buffers_of_first(trainer, model)
        found, errors = dict[str, Explanation](), dict[str, Exception]()
        try:
            return explain_by(methods), errors  # together, as they share their passes
        except Exception as error:
            if len(methods) == 1:
                return found, dict.fromkeys(methods, error)
        for name, options in methods.items():
            try:
                found |= explain_by({name: options})
            except Exception as error:
                errors[name] = error
    return found, errors


def _of_core(target: Target, samples: Samples, part: slice) -> Any:
    """Says the target as `vitx.explain` takes it."""
    if target != "label":
        return None if target == "predicted" else target
    if samples.labels is None or samples.labels.ndim != 1:
        raise VitxError('target="label" needs a class for each image: give a data set of (image, class)')
    return samples.labels[part]
