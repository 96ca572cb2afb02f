"""Explain the watched images, each rank its share of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitx.attribution import find_method
from vitx.errors import VitxError
from vitx.evaluation.faithfulness import faithfulness, of_another_class
from vitx.evaluation.perturbation import Measure
from vitx.explaining import explain_methods
from vitx.explanation import Explanation, join
from vitx.models.isolation import untouched
from vitx.targets import Prompted, Question, Text
from vitx.watch.calling import Forward, call_of
from vitx.watch.host import Host
from vitx.watch.images import Samples
from vitx.watch.nested import last
from vitx.watch.observed import ObservedStep
from vitx.watch.outputs import Output, kind_in_training
from vitx.watch.randomness import seeded

T = TypeVar("T")

_BATCH = 32  # images explained at once
_LONGEST = 64  # firings

TargetOption = str | int | Callable[[Tensor], Tensor] | Question
Options = Mapping[str, Mapping[str, Any]]  # of each method, by its name


class SampleExplainer:
    """Explain the same images again and again, as the options of `vitx.watch.Settings` say."""

    def __init__(
        self, methods: Options, target: TargetOption, forward_fn: Forward | None, names: Sequence[str] | None
    ) -> None:
        self.target, self.output = target, Output()
        self.observed: ObservedStep | None = None  # the user's own step, where that was recorded
        self._methods, self._forward_fn, self._class_names = methods, forward_fn, names
        self._firing = 0
        self._failed: dict[str, tuple[int, int]] = {}  # of methods: a pause, and the firing after it

    def learn(self, observed: ObservedStep | None) -> None:
        """Take what a recording of the user's step tells."""
        self.observed = observed
        if observed is not None:
            self.output = Output()

    def explain(
        self, host: Host, model: nn.Module, samples: Samples
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Explain all samples; called by all ranks, and the same on each of them, on the CPU.

        A method that fails takes no other with it. It is tried again after 1, 2, 4, ... 64 firings, alone.

        Returns:
            The explanation of each method, by its name, and the error of each that failed, on any rank.
        """
        self._firing += 1
        if not self._due():
            return {}, {}
        with untouched(model):
            host.group.take_buffers_of_first(model)
            if self.output.kind is None:
                self.output = self._look(host, model, samples)
            found, errors = self._try(host, model, samples, self._due())
        for name in errors:
            pause = min(2 * self._failed.get(name, (0, 0))[0] or 1, _LONGEST)
            self._failed[name] = pause, self._firing + pause
        self._failed = {name: pause for name, pause in self._failed.items() if name not in found}
        return {name: found[name] for name in self.methods if name in found}, errors

    @property
    def methods(self) -> Options:
        """The options of the methods in use: where there are no classes, `attention` for those of a class."""
        if not self._classless:
            return self._methods
        kept = {name: options for name, options in self._methods.items() if not find_method(name).gradient}
        return kept if len(kept) == len(self._methods) else kept | {"attention": kept.get("attention", {})}

    @property
    def _classless(self) -> bool:
        """True if the prediction is asked for, and the output tells none."""
        return self.target == "predicted" and not self.output.predicts

    @property
    def _asks(self) -> bool:
        """True if no class of the output is asked for."""
        return self.target == "caption" or isinstance(self.target, Question)

    def doubts(self, samples: Samples, names: Sequence[str] | None) -> Iterator[str]:
        """Yield what does not fit together, and what to do about it."""
        yield from self.output.doubts(samples.labels, names)
        if self._classless:
            uncompared = self.observed is None or self.observed.kind is None
            scores = uncompared and self.output.words == "features"
            yield (
                f"the model puts out {self.output.words}: methods of a score need a target function; if its "
                "head stands elsewhere, give forward_fn, or the two as one model"
                f"{'; if these are scores, give class_names' if scores else ''}"
            )

    def _due(self) -> Options:
        after = {name: firing for name, (_, firing) in self._failed.items()}
        return {name: one for name, one in self.methods.items() if after.get(name, 0) <= self._firing}

    def _try(
        self, host: Host, model: nn.Module, samples: Samples, methods: Options
    ) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Try methods together, as they share their passes, but for those that failed before."""
        found, errors = dict[str, Explanation](), dict[str, Exception]()
        together = {name: options for name, options in methods.items() if name not in self._failed}
        alone = [{name: options} for name, options in methods.items() if name in self._failed]
        groups = [together, *alone] if together else alone
        for group in groups:  # which grows
            try:
                found |= self._explain(host, model, samples, group)
            except Exception as error:
                if len(group) > 1:
                    groups += [{name: options} for name, options in group.items()]
                else:
                    errors |= dict.fromkeys(group, error)
        return found, errors

    def _explain(
        self, host: Host, model: nn.Module, samples: Samples, methods: Options
    ) -> dict[str, Explanation]:
        def explain_part(part: slice) -> dict[str, Explanation]:
            explain = partial(explain_methods, methods=methods)
            found = self._run(host, model, samples, part, explain, self._target(samples))
            return {name: one.without_images().cpu() for name, one in found.items()}

        parts = host.group.of_parts(len(samples), _BATCH, explain_part)
        return {name: join([part[name] for part in parts]) for name in methods}

    def faithfulness(
        self, host: Host, model: nn.Module, samples: Samples, found: Mapping[str, Explanation], most: int
    ) -> dict[str, float]:
        """Measure how much better than chance each method's maps name what the model needs.

        Returns:
            `METHOD/deletion` and `insertion`, and of classes `reliance`: means over at most so many images,
            the first ones, the same on every rank.

        Raises:
            VitxError: There is no score that could fall.
        """
        if self._asks:
            raise VitxError("faithfulness is measured of classes and target functions alone")
        if self._classless:
            raise VitxError(f"the model puts out {self.output.words}: faithfulness needs a target function")
        measure: Measure = "sigmoid" if self.output.kind == "classes" else "probability"
        count, logits = min(most, len(samples)), next(iter(found.values())).logits
        others = None
        if self.output.of_classes and count > 1:
            others = samples.images[of_another_class(logits[:count])]

        def judge_part(part: slice) -> dict[str, Tensor]:
            maps = {name: one.maps[part] for name, one in found.items()}
            filled = None if others is None else others[part]
            known: dict[str, Any] = {"whole": logits[part], "others": filled, "first": part.start}
            do = partial(faithfulness, maps=maps, measure=measure, batch_size=_BATCH, **known)
            judged = self._run(host, model, samples, part, do, self._target(samples))
            return {
                f"{name}/{one}": value.float().cpu() for name in judged for one, value in judged[name].items()
            }

        with untouched(model):
            parts = host.group.of_parts(count, _BATCH, judge_part)
        return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}

    def _run(
        self, host: Host, model: nn.Module, samples: Samples, part: slice, do: Callable[..., T], target: Any
    ) -> T:
        """Run a function on the model as it is called, on some images and their target, on its device."""
        weight = next(model.parameters(), samples.images)
        device, kind = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        with host.precision():
            images = samples.images[part].to(device, kind)
            target = target[part] if isinstance(target, Tensor) else target
            if isinstance(target, Question):
                target = target.of(part)
            with seeded():  # whatever was drawn before, to choose the images
                if isinstance(target, Prompted):
                    if images.ndim != 4:
                        raise VitxError(
                            "a training shows a word of one picture for each prompt, (B, C, H, W), found "
                            f"{tuple(images.shape)}"
                        )
                    named = {last(name): one for name, one in {**inputs, samples.name: images}.items()}
                    return do(model, inputs=named, image=last(samples.name), target=target)
                if isinstance(target, Question) and target.runs_inside(model):
                    return do(model, images, target=target)
                observed = self.observed if samples.observed else None
                if samples.observed and observed is None:
                    raise VitxError(
                        "the step was seen on rank 0 alone: give forward_fn=lambda module, images: ..."
                    )
                call = call_of(model, self._forward_fn, observed, samples.name, inputs, host.by_name)
                return do(call, images, target=target)

    def _look(self, host: Host, model: nn.Module, samples: Samples) -> Output:
        """Learn from one image what the module puts out.

        Where that fails, nothing is learnt: then the methods fail, too, and say so.
        """
        try:
            target = self._target(samples) if self._asks else None
            explain = partial(explain_methods, methods=["rollout"])
            one = partial(self._run, host, model, samples, slice(0, 1), explain, target)
            logits = host.group.from_all(one)[0]["rollout"].logits
        except Exception:
            return Output()
        if self._asks:
            return Output.of(logits, self.target.kind if isinstance(self.target, Text) else "features")
        observed = self.observed if self._forward_fn is None else None
        names = self._class_names or samples.class_names or host.class_names()
        of_class = self.target != "predicted" and not callable(self.target)
        known = observed, self._class_names, names, of_class
        return Output.of(logits, kind_in_training(logits, samples, model, *known))

    def _target(self, samples: Samples) -> Any:
        """Return the target as `vitx.explain` takes it; of a number, it is the number."""
        if self.target == "predicted":
            return _number if self.output.of_numbers else None
        if self.target == "caption":
            return Text(*samples.captions, maps="own")
        if self.target != "label":
            return self.target
        if samples.labels is None or samples.labels.ndim != 1:
            raise VitxError('target="label" needs a class for each image: give a data set of (image, class)')
        return samples.labels


def _number(output: Tensor) -> Tensor:
    """Return the number of each image, (B,); of several, their sum."""
    return output.flatten(1).sum(1) if output.ndim > 1 else output
