"""Explains the watched images, each rank its share of them, and learns how that is done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vitx.attribution import find_method
from vitx.errors import VitxError
from vitx.evaluation.faithfulness import judge, of_another_class
from vitx.evaluation.perturbation import Measure
from vitx.explaining import explain_methods
from vitx.explanation import Explanation, join
from vitx.models.isolation import untouched
from vitx.models.outputs import Kind, beyond, declared_classes, kind_of, told_apart
from vitx.targets import Question, Text
from vitx.watch.calling import Forward, call_of
from vitx.watch.images import Samples
from vitx.watch.quiet import same_random_numbers
from vitx.watch.seen import Seen

if TYPE_CHECKING:
    from vitx.watch.host import Host

T = TypeVar("T")

_BATCH = 32  # images explained at once
_LONGEST = 64  # firings

Target = str | int | Callable[[Tensor], Tensor] | Question
Options = Mapping[str, Mapping[str, Any]]  # of each method, by its name


@dataclass
class Explainer:
    """Explains the same images again and again.

    Attributes:
        methods: the options of each method, by its name.
        target: "predicted", "label", "caption", a class, a function from logits to scores, or a question.
        forward_fn: a function from (model, images) to logits; by default the model's own forward.
        class_names: what the user calls the classes, or None.
        kind: what the model puts out; None as long as that is not known.
        seen: what the user's own step does; None where that was not seen.
        explained: the methods in use: where there are no classes, `attention` in place of those of a class.
    """

    methods: Options
    target: Target = "predicted"
    forward_fn: Forward | None = None
    class_names: Sequence[str] | None = None
    kind: Kind | None = None
    seen: Seen | None = None
    _outputs: int = 0  # of one image
    _puts_out: str = ""  # for each image, in words
    _pauses: dict[str, int] = field(default_factory=dict)  # firings between two tries of what fails
    _left: dict[str, int] = field(default_factory=dict)  # of these

    def explain(
        self, host: "Host", model: nn.Module, samples: Samples
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Explains all samples; called by all ranks. A method that fails takes no other with it.

        It is tried again after 1, 2, 4, ... 64 firings, alone.

        Args:
            host: knows the ranks and the precision.
            model: what is explained.
            samples: the images with what is known of them.

        Returns:
            The explanation of each method, by its name, on the CPU, the same on every rank; and the error of
            each that was tried and failed, on any of the ranks.
        """
        self._left = {name: left - 1 for name, left in self._left.items()}
        if not self._due():
            return {}, {}
        with untouched(model):
            host.group.take_buffers_of_first(model)
            if self.kind is None:
                self._look(host, model, samples)
            found, errors = self._try(host, model, samples, self._due())
        for name in errors:
            self._left[name] = self._pauses[name] = min(2 * self._pauses.get(name, 0) or 1, _LONGEST)
        for name in found:
            self._pauses.pop(name, None)
            self._left.pop(name, None)
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
        numbers = self.kind in ("numbers", "shares") and self._outputs > 1
        return self.target == "predicted" and (self.kind == "features" or numbers)

    @property
    def _asks(self) -> bool:
        """Whether what is asked for is no class of the model's output."""
        return self.target == "caption" or isinstance(self.target, Question)

    @property
    def of_classes(self) -> bool:
        """Whether its output is scores of classes."""
        return self.kind in ("class", "classes")

    def fits(self, names: Sequence[str] | None) -> bool:
        """Returns whether there is a name for each class."""
        return names is None or not self.of_classes or len(names) >= max(self._outputs, 2)

    def doubts(self, samples: Samples, names: Sequence[str] | None) -> Iterator[str]:
        """Yields what does not fit together, and what to do about it."""
        if names is not None and not self.fits(names):
            yield (
                f"{len(names)} names are left out, as there are {self._outputs} outputs: give class_names "
                "with one for each"
            )
        if samples.labels is not None and beyond(samples.labels, self._outputs):
            yield f"label {int(samples.labels.max())} is beyond the {self._outputs} outputs"
        if self.classless:
            unseen = self.seen is None or self.seen.kind is None
            scores = unseen and self._puts_out == "features"
            yield (
                f"the model puts out {self._puts_out}: methods of a score need a target function; if its "
                "head stands elsewhere, give forward_fn, or the two as one model"
                f"{'; if these are scores, give class_names' if scores else ''}"
            )

    def _due(self) -> Options:
        methods = self.explained.items()
        return {
            name: options for name, options in methods if name not in self._pauses or self._left[name] <= 0
        }

    def _try(
        self, host: "Host", model: nn.Module, samples: Samples, methods: Options
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Tries methods together, as they share their passes, but for those that failed before."""
        found, errors = dict[str, Explanation](), dict[str, Exception]()
        together = {name: options for name, options in methods.items() if name not in self._pauses}
        groups = [together] if together else []
        groups += [{name: options} for name, options in methods.items() if name in self._pauses]
        while groups:
            group = groups.pop(0)
            try:
                found |= self._explain(host, model, samples, group)
            except Exception as error:
                if len(group) > 1:
                    groups += [{name: options} for name, options in group.items()]
                else:
                    errors |= dict.fromkeys(group, error)
        return found, errors

    def _explain(
        self, host: "Host", model: nn.Module, samples: Samples, methods: Options
    ) -> dict[str, Explanation]:
        def explain_part(part: slice) -> dict[str, Explanation]:
            explain = partial(explain_methods, methods=methods)
            found = self._run(host, model, samples, part, explain, self._target(samples))
            return {name: one.without_images().cpu() for name, one in found.items()}

        parts = host.group.of_parts(len(samples), _BATCH, explain_part)
        return {name: join([part[name] for part in parts]) for name in methods}

    def faithfulness(
        self, host: "Host", model: nn.Module, samples: Samples, found: Mapping[str, Explanation], most: int
    ) -> dict[str, float]:
        """Says how much better than chance each method's maps name what the model needs.

        Args:
            host: knows the ranks and the precision.
            model: what is explained.
            samples: the images with what is known of them.
            found: the explanation of each method, of all samples, by its name.
            most: images that it is measured on, the first ones.

        Returns:
            `METHOD/deletion` and `insertion`, and of classes `reliance`: means, the same on every rank.

        Raises:
            VitxError: There is no score that could fall.
        """
        if self._asks:
            raise VitxError("faithfulness is measured of classes and target functions alone")
        if self.classless:
            raise VitxError(f"the model puts out {self._puts_out}: faithfulness needs a target function")
        measure: Measure = "sigmoid" if self.kind == "classes" else "probability"

        count, logits = min(most, len(samples)), next(iter(found.values())).logits
        others = None
        if self.of_classes and count > 1:
            others = samples.images[of_another_class(logits[:count])]

        def judge_part(part: slice) -> dict[str, Tensor]:
            maps = {name: one.maps[part] for name, one in found.items()}
            filled = None if others is None else others[part]
            known: dict[str, Any] = {"whole": logits[part], "others": filled, "first": part.start}
            do = partial(judge, maps=maps, measure=measure, batch_size=_BATCH, **known)
            judged = self._run(host, model, samples, part, do, self._target(samples))
            return {
                f"{name}/{kind}": one.float().cpu() for name in judged for kind, one in judged[name].items()
            }

        with untouched(model):
            parts = host.group.of_parts(count, _BATCH, judge_part)
        return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}

    def _run(
        self,
        host: "Host",
        model: nn.Module,
        samples: Samples,
        part: slice,
        do: Callable[..., T],
        target: Any = None,
    ) -> T:
        """Does something with the model as it is called, some images on its device, and what is explained."""
        weight = next(model.parameters(), samples.images)
        device, kind = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        with host.precision():
            images = samples.images[part].to(device, kind)
            target = target[part] if isinstance(target, Tensor) else target
            if isinstance(target, Text):  # which finds the towers by itself
                call, target = model, target.of(part)
            else:
                told_or_seen = self.forward_fn, self._seen_of(samples)
                call = call_of(model, *told_or_seen, samples.name, inputs, host.by_name)
            with same_random_numbers():  # whatever was drawn before, to choose the images
                return do(call, images, target=target)

    def _seen_of(self, samples: Samples) -> Seen | None:
        """Returns what was seen, where the samples are what was seen."""
        if samples.seen and self.seen is None:
            raise VitxError("the step was seen on rank 0 alone: give forward_fn=lambda module, images: ...")
        return self.seen if samples.seen else None

    def _look(self, host: "Host", model: nn.Module, samples: Samples) -> None:
        """Learns from one image what the module puts out.

        Where that fails, nothing is learnt: then the methods fail, too, and say so.
        """
        try:
            target = self._target(samples) if self._asks else None
            explain = partial(explain_methods, methods=["rollout"])
            one = partial(self._run, host, model, samples, slice(0, 1), explain, target)
            logits = host.group.from_all(one)[0]["rollout"].logits
        except Exception:
            return
        self._outputs = logits[0].numel()
        sizes = " x ".join(map(str, logits.shape[1:]))
        self._puts_out = "features" if logits.ndim < 3 else f"{sizes} numbers for each image"
        if self._asks:
            self.kind = self.target.kind if isinstance(self.target, Text) else "features"
            return
        if self.seen is not None and self.seen.kind is not None and self.forward_fn is None:
            seen = told_apart(self.seen.kind, self._outputs, samples.labels)
            self.kind = seen if logits.ndim in (1, 2) else "features"
            return
        said = self.target != "predicted" and not callable(self.target)
        names = self.class_names or samples.class_names or host.class_names()
        declared = {*declared_classes(model), *([len(self.class_names)] if self.class_names else [])}
        counts = range(len(names), len(names) + 1) if names else samples.counts
        kind = kind_of(logits, samples.labels, counts, frozenset(declared))
        if logits.ndim in (1, 2) and said and kind == "features":
            kind = "class"
        elif not said and logits.shape[-1] not in {*declared, *(counts or ())}:
            uncompared = self.seen is not None and self.forward_fn is None
            if samples.unlabelled or uncompared:
                kind = "features"
        self.kind = kind

    def _target(self, samples: Samples) -> Any:
        """Says the target as `vitx.explain` takes it; of a number, it is the number."""
        if self.target == "predicted":
            return _number if self.kind in ("numbers", "shares") else None
        if self.target == "caption":
            return Text([*samples.captions], maps="own")
        if self.target != "label":
            return self.target
        if samples.labels is None or samples.labels.ndim != 1:
            raise VitxError('target="label" needs a class for each image: give a data set of (image, class)')
        return samples.labels


def _number(output: Tensor) -> Tensor:
    """Returns the number of each image, (B,); of several, their sum."""
    return output.flatten(1).sum(1) if output.ndim > 1 else output
