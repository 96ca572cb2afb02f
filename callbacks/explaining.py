"""Explains the watched images, each rank its share of them, and learns how that is done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from vitx.methods import find_method
from vitx.outputs import Kind, declared_classes, kind_of

_BATCH = 32  # images explained at once

Target = str | int | Callable[[Tensor], Tensor]
Options = Mapping[str, Mapping[str, Any]]  # of each method, by its name


@dataclass
class Explainer:
    """Explains the same images again and again.

    Attributes:
        methods: the options of each method, by its name.
        target: "predicted", "label", a class, or a function from logits to scores.
        forward_fn: a function from (model, images) to logits; by default the model's own forward.
        class_names: what the user calls the classes, or None.
        kind: what the model puts out; None as long as that is not known.
        explained: the methods in use: where there are no classes, `attention` in place of those of a class.
    """

    methods: Options
    target: Target = "predicted"
    forward_fn: Forward | None = None
    class_names: Sequence[str] | None = None
    kind: Kind | None = None
    _single: bool = False  # it is one number for each image
    _way: int | None = None  # to call the module
    _firings: int = 0
    _failed: dict[str, int] = field(default_factory=dict)  # how often, one after the other
    _again: dict[str, int] = field(default_factory=dict)  # at which firing a failed one is due

    def explain(
        self, trainer: pl.Trainer, model: nn.Module, samples: Samples
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Explains all samples; called by all ranks. A method that fails takes no other with it.

        It is tried again after 1, 2, 4, ... firings, alone.

        Args:
            trainer: knows the ranks and the precision.
            model: what is explained.
            samples: the images with what is known of them.

        Returns:
            The explanation of each method, by its name, on the CPU, the same on every rank; and the error of
            each that was tried and failed, on any of the ranks.
        """
        self._firings += 1
        if not self._due():
            return {}, {}
        with untouched(model):
            ranks.take_buffers_of_first(trainer, model)
            if self.kind is None:
                self._look(trainer, model, samples)
            found, errors = self._try(trainer, model, samples, self._due())
        for name in errors:
            self._failed[name] = self._failed.get(name, 0) + 1
            self._again[name] = self._firings + 2 ** (self._failed[name] - 1)
        for name in found:
            self._failed.pop(name, None)
        return {name: found[name] for name in self.explained if name in found}, errors

    @property
    def explained(self) -> Options:
        """The options of the methods in use, by their names."""
        if not self.classless:
            return self.methods
        kept = {name: options for name, options in self.methods.items() if not find_method(name).gradient}
        return kept if len(kept) == len(self.methods) else kept | {"attention": kept.get("attention", {})}

    @property
    def classless(self) -> bool:
        """Whether it is asked for what the model predicts, and its output says nothing of the kind."""
        numbers = self.kind == "numbers" and not self._single
        return self.target == "predicted" and (self.kind == "features" or numbers)

    def _due(self) -> Options:
        methods = self.explained.items()
        return {name: options for name, options in methods if self._again.get(name, 0) <= self._firings}

    def _try(
        self, trainer: pl.Trainer, model: nn.Module, samples: Samples, methods: Options
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Tries methods together, as they share their passes, but for those that failed before."""
        found, errors = dict[str, Explanation](), dict[str, Exception]()
        together = {name: options for name, options in methods.items() if name not in self._failed}
        groups = [together] if together else []
        groups += [{name: options} for name, options in methods.items() if name in self._failed]
        while groups:
            group = groups.pop(0)
            try:
                found |= self._explain(trainer, model, samples, group)
            except Exception as error:
                if len(group) > 1:
                    groups += [{name: options} for name, options in group.items()]
                else:
                    errors |= dict.fromkeys(group, error)
        return found, errors

    def _explain(
        self, trainer: pl.Trainer, model: nn.Module, samples: Samples, methods: Options
    ) -> dict[str, Explanation]:
        def explain_share() -> list[dict[str, Explanation]]:
            share = ranks.share(trainer, len(samples))
            starts = range(share.start, share.stop, _BATCH)
            parts = [slice(start, min(start + _BATCH, share.stop)) for start in starts]
            return [
                self._part(trainer, model, samples, methods, part, self._target(samples)) for part in parts
            ]

        parts = [part for of_rank in ranks.from_all(trainer, explain_share) for part in of_rank]
        return {name: join([part[name] for part in parts]) for name in methods}

    def _part(
        self,
        trainer: pl.Trainer,
        model: nn.Module,
        samples: Samples,
        methods: Options,
        part: slice,
        target: Any = None,
    ) -> dict[str, Explanation]:
        device = next(model.parameters(), samples.images).device
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        with trainer.precision_plugin.forward_context():
            images = samples.images[part].to(device)
            target = target[part] if isinstance(target, Tensor) else target
            ways = list(ways_to_call(model, self.forward_fn, samples.name, inputs))
            if self._way is not None:
                return _on_cpu(explain_methods(ways[self._way], images, methods, target=target))
            found, self._way = by_any_way(
                ways, lambda way: explain_methods(way, images, methods, target=target)
            )
        return _on_cpu(found)

    def _look(self, trainer: pl.Trainer, model: nn.Module, samples: Samples) -> None:
        """Learns from one image how the module is called and what it puts out.

        Where that fails, nothing is learnt: then the methods fail, too, and say so.
        """
        try:
            one = partial(self._part, trainer, model, samples, {"rollout": {}}, slice(0, 1))
            logits = ranks.from_all(trainer, one)[0]["rollout"].logits
        except Exception:
            return
        said = self.target != "predicted" and not callable(self.target)
        names = self.class_names or samples.class_names
        declared = {*declared_classes(model), *([len(self.class_names)] if self.class_names else [])}
        counts = range(len(names), len(names) + 1) if names else samples.counts
        kind = kind_of(logits, samples.labels, counts, frozenset(declared))
        if logits.ndim in (1, 2) and said and kind == "features":
            kind = "class"
        elif samples.unlabelled and not said and logits.shape[-1] not in declared:
            kind = "features"
        self.kind, self._single = kind, logits[0].numel() == 1

    def _target(self, samples: Samples) -> Any:
        """Says the target as `vitx.explain` takes it; of a number, it is the number."""
        if self.target == "predicted":
            return (lambda output: output.reshape(len(output))) if self.kind == "numbers" else None
        if self.target != "label":
            return self.target
        if samples.labels is None or samples.labels.ndim != 1:
            raise VitxError('target="label" needs a class for each image: give a data set of (image, class)')
        return samples.labels


def _on_cpu(found: Mapping[str, Explanation]) -> dict[str, Explanation]:
    return {name: explanation.cpu() for name, explanation in found.items()}
