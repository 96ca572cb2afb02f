"""Explanation of the watched images, shared among the ranks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitx.attribution import Methods, find_method
from vitx.errors import VitxError, in_words
from vitx.evaluation.faithfulness import faithfulness, of_another_class
from vitx.evaluation.perturbation import Measure
from vitx.explaining import explain_methods
from vitx.explanation import Explanation, join
from vitx.models.isolation import untouched
from vitx.models.outputs import Kind, beyond, classes_in, declared_classes, kind_of, told_apart
from vitx.pictures.captions import Names
from vitx.targets import Prompted, Question, Text
from vitx.watch.calling import FORWARD_FN, call_of
from vitx.watch.host import Host
from vitx.watch.images import Samples
from vitx.watch.nested import last
from vitx.watch.observed import ObservedStep
from vitx.watch.readers import held_by_modules, seeded
from vitx.watch.settings import Settings

T = TypeVar("T")

_GIVE = "give batch_transform or forward_fn"
_BATCH = 32  # images explained at once

_CLASSES, _NUMBERS = ("class", "classes"), ("numbers", "shares")


class SampleExplainer:
    """Explain the same images at each firing, as the settings say."""

    def __init__(self, settings: Settings, where: str = "", observed: ObservedStep | None = None) -> None:
        self._settings = settings
        self.where = where  # the name of the user's own step, once it has run
        self.observed = observed  # this step, if it could be recorded
        self.kind: Kind | None = None  # of the output; None until it is known
        self._shape: Sequence[int] = ()  # of the output of one image
        self._unlooked = ""  # why its kind could not be determined
        self._classless = ""  # describes an output that holds no prediction to explain
        self._asks = settings.target == "caption" or isinstance(settings.target, Question)  # about no class

    def explain(self, host: Host, samples: Samples) -> tuple[dict[str, Explanation], dict[str, Exception]]:
        """Return each method's explanation, and the error of each that failed, the same on all ranks.

        The methods share passes through the model; if one of them fails, each is tried alone.
        """
        found, errors = dict[str, Explanation](), dict[str, Exception]()

        def explain_part(methods: Methods, part: slice) -> dict[str, Explanation]:
            done = self._run(host, samples, part, partial(explain_methods, methods=methods))
            return {name: one.without_images().cpu() for name, one in done.items()}

        with untouched(model := host.explained(self._settings.weights)):
            host.group.take_buffers_of_first(model)
            if self.kind is None:
                self._look(host, model, samples)
            methods = dict(self._settings.methods)
            if self._classless and any(find_method(name).gradient for name in methods):
                methods = {name: one for name, one in methods.items() if not find_method(name).gradient}
                methods.setdefault("attention", {})
            groups: list[Methods] = [methods]
            for group in groups:  # grows in the loop
                try:
                    parts = host.group.of_parts(len(samples), _BATCH, partial(explain_part, group))
                    found |= {name: join([part[name] for part in parts]) for name in group}
                except Exception as error:
                    if len(group) > 1:
                        groups += [{name: options} for name, options in group.items()]
                    else:
                        errors |= dict.fromkeys(group, error)
        return {name: found[name] for name in methods if name in found}, errors

    def fitting(self, host: Host, samples: Samples, names: Names) -> tuple[Names, list[str]]:
        """Return the class names, or None if there is not one for each output, and hints on what is wrong."""
        width, labels, said = prod(self._shape), samples.labels, list(self._unlike(host, samples))
        classes = max(width, 2)  # a single output decides between two
        if names is not None and self.kind in _CLASSES and len(names) != classes:
            said.append(
                f"{len(names)} names for {classes} classes are left out: give class_names, one for each"
            )
            names = None
        if self.kind is None:
            one = f"as one image alone could not be explained ({self._unlooked})"
            said.append(f"the output is taken for scores of classes, {one}: {FORWARD_FN}")
        if labels is not None and beyond(labels, width):
            said.append(f"label {int(labels.max())} is beyond the {width} outputs")
        if self.observed is not None and self.observed.note and not self._settings.forward_fn:
            said.append(self.observed.note)
        if self._classless:
            elsewhere = "if its head is a separate module, give forward_fn, or a model of both"
            said.append(f"{self._classless}: explaining a score needs a target function; {elsewhere}")
            if len(self._shape) < 2 and (self.observed is None or self.observed.kind is None):
                said.append("if these are scores, give class_names")
        return names, said

    def _unlike(self, host: Host, samples: Samples) -> Iterator[str]:
        """Yield a hint if the model may be given something else than in the user's step."""
        settings, observed = self._settings, self.observed
        if not (self.where and samples.source) or settings.forward_fn or settings.batch_transform:
            return
        if observed is None:
            yield f"what {self.where} does to the images was not seen: if it changes them, {_GIVE}"
        elif samples.observed:
            model, paths = host.explained(settings.weights), {*samples.inputs, samples.name}
            if lacks := observed.lacks(model, paths):
                yield f"{self.where} also uses {', '.join(lacks)}, which is left out here: {_GIVE}"

    def faithfulness(self, host: Host, samples: Samples, found: dict[str, Explanation]) -> dict[str, float]:
        """Return `vitx/METHOD/deletion`, `insertion` and, for classes, `reliance`, the same on every rank."""
        if self._asks:
            raise VitxError("faithfulness can be measured only for classes and target functions")
        if self._classless:
            raise VitxError(f"{self._classless}: faithfulness needs a target function")
        measure: Measure = "sigmoid" if self.kind == "classes" else "probability"
        count, logits = min(self._settings.faithfulness, len(samples)), next(iter(found.values())).logits
        compared = self.kind in _CLASSES and count > 1
        others = samples.images[of_another_class(logits[:count])] if compared else None

        def judge_part(part: slice) -> dict[str, Tensor]:
            known: dict[str, Any] = {"maps": {name: one.maps[part] for name, one in found.items()}}
            known |= {"whole": logits[part], "others": None if others is None else others[part]}
            do = partial(faithfulness, measure=measure, batch_size=_BATCH, first=part.start, **known)
            judged = self._run(host, samples, part, do)
            return {f"vitx/{name}/{one}": v.cpu() for name in judged for one, v in judged[name].items()}

        parts = host.group.of_parts(count, _BATCH, judge_part)
        return {name: torch.cat([part[name] for part in parts]).float().mean().item() for name in parts[0]}

    def _run(self, host: Host, samples: Samples, part: slice, do: Callable[..., T]) -> T:
        """Run a function on the callable model, some of the images and their target, on its device."""
        model = host.explained(self._settings.weights)
        weight = next(model.parameters(), samples.images)
        device, kind = weight.device, weight.dtype if weight.is_floating_point() else torch.float32
        inputs = {name: value[part].to(device) for name, value in samples.inputs.items()}
        if not (samples.images.is_floating_point() or samples.observed or self._settings.forward_fn):
            raise VitxError(f"images must be floating point, found {samples.images.dtype}: {_GIVE}")
        images, target = samples.images[part].to(device, kind), self._target(samples, part)
        with host.precision(), seeded(*held_by_modules(model)):  # whatever choosing the images drew
            if isinstance(target, Prompted):
                if images.ndim != 4:
                    found = f"(B, C, H, W), found {tuple(images.shape)}"
                    raise VitxError(f"in a training, a word needs one picture for each prompt, {found}")
                named = {last(name): one for name, one in {**inputs, samples.name: images}.items()}
                return do(model, inputs=named, image=last(samples.name), target=target)
            if isinstance(target, Question) and target.runs_inside(model):
                return do(model, images, target=target)
            if samples.observed and self.observed is None:
                raise VitxError(f"the step was recorded on rank 0 alone: {FORWARD_FN}")
            observed = self.observed if samples.observed else None
            called = self._settings.forward_fn, observed, samples.name, inputs, host.by_name
            return do(call_of(model, *called), images, target=target)

    def _look(self, host: Host, model: nn.Module, samples: Samples) -> None:
        """Determine the kind of output from one image."""
        try:
            look = partial(explain_methods, methods=["rollout"])
            (one,) = host.group.of_parts(1, 1, lambda part: self._run(host, samples, part, look))
            logits = one["rollout"].logits
        except Exception as error:
            self._unlooked = in_words(error)
            return
        self.kind, self._shape = self._kind(host, model, samples, logits), logits.shape[1:]
        several = self.kind in _NUMBERS and prod(self._shape) > 1
        if self._settings.target == "predicted" and (several or self.kind == "features"):
            numbers = f"{' x '.join(map(str, self._shape))} numbers for each image"
            self._classless = f"the model outputs {numbers if len(self._shape) > 1 else 'features'}"

    def _kind(self, host: Host, model: nn.Module, samples: Samples, logits: Tensor) -> Kind:
        """Return the kind of output, from the user's step, or else from labels, class names and model."""
        target, own = self._settings.target, self._settings.class_names
        if self._asks:
            return target.kind if isinstance(target, Text) else "features"
        flat, observed = logits.ndim in (1, 2), None if self._settings.forward_fn else self.observed
        if observed is not None and observed.kind is not None:
            # Where an output depends on how many images there are, its columns are images, not classes.
            flat = flat and logits.shape[1:] == observed.output.value.shape[1:]
            return told_apart(observed.kind, logits[0].numel(), samples.labels) if flat else "features"
        names = own or samples.class_names or host.class_names()
        declared = {*declared_classes(model), len(own or ())}
        counts = range(len(names), len(names) + 1) if names else samples.counts
        kind = kind_of(logits, samples.labels, counts, frozenset(declared))
        if target != "predicted" and not callable(target):  # maps of a class are asked for
            return "class" if flat and kind == "features" else kind
        uncompared = samples.unlabeled or observed is not None
        return "features" if uncompared and logits.shape[-1] not in {*declared, *(counts or ())} else kind

    def _target(self, samples: Samples, part: slice) -> Any:
        """Return the target of some images as `vitx.explain` takes it; the target of numbers is their sum."""
        target: Any = self._settings.target
        if target == "predicted" or (target == "label" and self.kind is None):
            return _number if self.kind in _NUMBERS else None
        if target == "label":
            target = classes_in(samples.labels, prod(self._shape)) if self.kind == "class" else None
            if target is None:
                found = "no labels" if samples.labels is None else f"labels for an output of {self.kind}"
                given = "give labels, a class, as target=3, or a function of the output"
                raise VitxError(f'target="label" needs a class for each image, found {found}: {given}')
        if target == "caption":
            target = Text(*samples.captions, maps="own")
        if isinstance(target, Question):
            return target.of(part)
        return target[part] if isinstance(target, Tensor) else target


def _number(output: Tensor) -> Tensor:
    """Return the number that is output for each image, or the sum of several, (B,)."""
    return output.flatten(1).sum(1) if output.ndim > 1 else output
