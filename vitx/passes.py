"""One forward pass of a model, the score that a target selects, and the backward pass of each method."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitx.attribution import Methods, find_method
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.functional.tiles import full
from vitx.inputs.preprocessing import normalization
from vitx.models.classes import declared_names, short
from vitx.models.given import Inputs
from vitx.models.isolation import untouched, without_autocast
from vitx.models.lens import layer_logits, watched
from vitx.models.outputs import described, main, mask_queries
from vitx.models.prediction import Target as Classes
from vitx.models.prediction import read_logits, scores, target_classes
from vitx.tape.backward import Attribution, Backward
from vitx.tape.recorder import Recorder
from vitx.tape.score import Score, evenly, logits_of, output_value, score_of
from vitx.tape.sinks import Sinks, find_sinks
from vitx.tape.tape import Tape
from vitx.tape.values import Value
from vitx.targets.query import objects_of
from vitx.targets.question import Answers, Asked, Question
from vitx.targets.spot import Spot, find_spot, outlines
from vitx.tracing import Trace

Target = Classes | Question
Show = Callable[[Trace], None] | None


class End(NamedTuple):
    """The end of a forward pass: the model's output, and the score that is computed from it."""

    value: Value  # of the output that the score is computed from
    output: Tensor  # (B, ...): the logits, or the scores of a question
    logits: Tensor  # the main output of the model; the scores if it has none
    total: Callable[[Tensor], Tensor]  # computes the sum of the scores of all images from `output`
    objects: Tensor | None  # (B, Q), the confidence of each query of a detector
    classes: Tensor | None = None  # (B,); None if the target has no class
    answers: Answers = Answers()
    spot: Spot | None = None  # the token to explain; None to explain a score of the output


def follow(
    model: nn.Module,
    images: Tensor,
    methods: Methods,
    target: Target,
    network: str | None,
    inputs: Inputs,
    show: Show,
) -> dict[str, Explanation]:
    """Explain by methods that share one forward pass. The tape is cleared, unless it is handed to `show`."""
    chosen = {name: find_method(name) for name in methods}
    fusions = {method.head_fusion(methods[name]) for name, method in chosen.items()}
    tape = Tape(
        model,
        network=network,
        accounts=any(method.accounts for method in chosen.values()),
        head_fusion=None if network or len(fusions) > 1 else fusions.pop(),
        named=show is not None,
        together=inputs.together,
    )
    try:
        with torch.inference_mode(False), torch.no_grad(), untouched(model):
            asked = target.put(model, images) if isinstance(target, Question) else Asked(images)
            images, tape.ends = asked.images, None if asked.cells is None else {}
            recorder, dtype = Recorder(tape), torch.promote_types(images.dtype, torch.float32)
            lens = any(method.gradient == "layer scores" for method in chosen.values())
            end, layer_scores = _record(recorder, model, asked, target, inputs, lens)
            spot = end.spot
            score = cache(lambda: spot.score if spot else score_of(end.value, end.total, end.output, dtype))
            found: dict[str, Attribution] = {}
            sinks: Sinks | None = None
            for name, method in chosen.items():
                if spot is not None:
                    start = spot.start
                elif target is not None or (method.gradient and end.classes is not None):
                    start = score().start
                else:
                    start = evenly(end.output).to(dtype)
                read = [score()] if method.gradient == "score" else layer_scores if method.gradient else []
                back = Backward(tape, images, start, end.value, read)
                with without_autocast(images.device):
                    if not found:
                        sinks = find_sinks(tape, lambda parts: back.place(parts).maps)  # noqa: B023
                    back.sinks = sinks
                    found[name] = method.find(back, **methods[name])
                _check_map(name, found[name].maps, end)
            if show is not None:
                show(Trace(tape, recorder, back.passed))
            return _explained(model, images, found, end, back)
    finally:
        if show is None:
            tape.clear()


def _record(
    recorder: Recorder, model: nn.Module, asked: Asked, target: Target, inputs: Inputs, lens: bool
) -> tuple[End, list[Score]]:
    """Record a forward pass; return its end and, with the logit lens, the score of each layer."""
    dtype = torch.promote_types(asked.images.dtype, torch.float32)
    if lens and isinstance(target, Question):
        raise VitxError("legrad explains only classes: use another method for this target")
    pixels = asked.images.detach().as_subclass(Tensor).clone()  # some models modify their input
    recorder.begin(pixels)
    watching: AbstractContextManager[Any] = watched(model) if lens else nullcontext()
    with recorder.recording(), watching as blocks:
        end = _run(recorder, model, pixels, asked, target, inputs)
    if asked.cells is not None:  # the token is only known after the pass
        spot = find_spot(recorder.tape, len(pixels), asked.cells, dtype)
        boxes = outlines(asked.cells(spot.grid), spot.grid, pixels.shape[2:])
        end = end._replace(spot=spot, value=spot.score.value, answers=end.answers._replace(boxes=boxes))
    if not lens:
        return end, []
    with recorder.recording():
        each = [layer_logits(*block) for block in blocks]
    if [end.output.shape] * len(recorder.tape.layers) != [one.shape for one in each]:
        shapes = sorted({tuple(one.shape) for one in each})
        counted = f"{len(each)} blocks with scores of shape {shapes}, {len(recorder.tape.layers)} attentions"
        needs = "one attention in each block, and the model's own head at its end"
        output = f"an output of shape {tuple(end.output.shape)}"
        raise VitxError(f"found {counted} and {output}: legrad needs {needs}")
    return end, [score_of(recorder.get(own), end.total, own, dtype) for own in each]


def _run(
    recorder: Recorder, model: nn.Module, images: Tensor, asked: Asked, target: Target, inputs: Inputs
) -> End:
    """Run the model while the tape records, and find the output that the score is computed from."""
    output = asked.forward(model, images, inputs)
    objects = objects_of(output, model)
    if not isinstance(target, Question):
        if mask_queries(output) is not None:
            raise VitxError(described(output))
        logits = read_logits(output, images, recorder.made_last, inputs)
        value = output_value(recorder.tape, recorder.get(logits))
        if not callable(target):
            value, logits = logits_of(value, logits, recorder.squashed)
        classes = target_classes(target, logits)
        return End(
            value, logits, logits, lambda found: scores(target, found, classes).sum(), objects, classes
        )
    found = main(output)
    answers: Any = asked.answers(output)  # of a question that anyone may write
    if not isinstance(answers, Answers):
        wrong = type(answers).__name__
        raise VitxError(f"the answers of a question must be vitx.targets.Answers, found {wrong}")
    score = answers.scores
    if (score is None) == (asked.cells is None):
        wanted = "a score for each image, by Answers(scores), or a patch of each, by Asked(cells=...)"
        raise VitxError(f"a question gives {wanted}: found {'neither' if score is None else 'both'}")
    if score is None:  # the score of a token is set after the pass
        value, score = recorder.tape.values[-1], images.new_zeros(len(images), 0)
    elif score.ndim != 1 or len(score) not in ((1, len(images)) if inputs.together else (len(images),)):
        raise VitxError(f"a target must give one score for each image, found {tuple(score.shape)}")
    else:
        value = output_value(recorder.tape, recorder.get(score))
    return End(value, score, score if found is None else found, torch.sum, objects, answers=answers)


def _explained(
    model: nn.Module, images: Tensor, found: Mapping[str, Attribution], end: End, back: Backward
) -> dict[str, Explanation]:
    """Build the explanation of each method from its maps and the end of the pass."""
    logits, classes, captions = full(end.logits.detach()), end.classes, end.answers.captions
    if len(logits) not in (1, len(images)):
        said = f"the model returned {tuple(logits.shape)} for {len(images)} pictures"
        raise VitxError(f"{said}: explain prompts one by one")
    if len(logits) < len(images):  # the images of one prompt share its logits
        logits = logits.expand(len(images), *logits.shape[1:])
        classes = None if classes is None else classes.expand(len(images))
        captions = None if captions is None else [*captions] * len(images)
    mean, std = normalization(model)
    names, channels = [short(name) for name in declared_names(model) or ()], back.grid.channels
    return {
        name: Explanation(
            maps=one.maps,
            logits=logits,
            target=classes if find_method(name).gradient else None,
            image_size=tuple(count for dim, count in enumerate(images.shape) if dim not in (0, channels)),
            images=images,
            mean=mean,
            std=std,
            method=name,
            conservation=one.conservation,
            signed=one.signed,
            channels=channels,
            captions=captions,
            boxes=end.answers.boxes,
            paired=end.answers.paired,
            objects=end.objects,
            sinks=None if back.sinks is None else back.sinks.marked(one.maps),
            class_names=names if logits.shape[1:] == (len(names),) else None,
        )
        for name, one in found.items()
    }


def _check_map(name: str, maps: Tensor, end: End) -> None:
    """Raise a VitxError unless maps are finite, and in the grid of the tokens that a question is about."""
    grid, bad = tuple(maps.shape[1:]), (~maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        said = f"the {name} maps of images {bad} are not finite"
        raise VitxError(f"{said}: the images or the weights hold NaN or infinite values")
    said = f"the map has a grid of {grid}, but the tokens of the"
    if end.spot is not None and grid != end.spot.grid:
        said = f"{said} last layer have a grid of {end.spot.grid}"
        raise VitxError(f"{said}: give a score of the features of that token as the target")
    taken = end.answers.grid
    if taken is not None and grid[0] * taken[1] != grid[1] * taken[0]:
        said = f"{said} output seemed to have one of {taken}"
        raise VitxError(f"{said}: give a function from the output to scores (B,) as the target")
