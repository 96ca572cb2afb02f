"""One pass of a model, and the way back of each method that shares it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor, nn

from vitx.attribution import Method, Methods, find_method
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.inputs.preprocessing import normalization
from vitx.models.given import ALONE, Inputs
from vitx.models.isolation import untouched, without_autocast
from vitx.models.lens import LogitLens
from vitx.models.prediction import Target as Classes
from vitx.tape.backward import Attribution, Backward
from vitx.tape.output import Score, evenly, score_of
from vitx.tape.recorder import Recorder
from vitx.tape.sinks import Sinks, find_sinks
from vitx.tape.tape import Tape
from vitx.tape.trace import Trace
from vitx.tape.values import Value
from vitx.targets.question import Asked, Question
from vitx.targets.reading import End, located, run

Target = Classes | Question


def follow(
    model: nn.Module,
    images: Tensor,
    methods: Methods,
    target: Target,
    network: str | None,
    inputs: Inputs = ALONE,
    show: Callable[[Trace], None] | None = None,
) -> dict[str, Explanation]:
    """Explain by methods that share one forward pass, each of which has its own way back.

    Where the tape is to be shown, it stays. Arguments are those of `vitx.explain`.
    """
    chosen = {name: find_method(name) for name in methods}
    tape = Tape(
        model,
        network=network,
        accounts=any(method.accounts for method in chosen.values()),
        head_fusion=None if network else _common_fusion(chosen, methods),
        named=show is not None,
        together=inputs.together,
    )
    try:
        with torch.inference_mode(False), torch.no_grad(), untouched(model):
            asked = target.put(model, images) if isinstance(target, Question) else target
            if isinstance(asked, Asked):
                images = asked.images
                tape.ends = None if asked.cells is None else {}
            recorder, dtype = Recorder(tape), torch.promote_types(images.dtype, torch.float32)
            end, layer_scores = _record(recorder, model, images, asked, inputs, chosen.values())
            score = cache(partial(end.score, dtype))
            found: dict[str, Attribution] = {}
            sinks: Sinks | None = None
            for name, method in chosen.items():
                if end.spot is not None:
                    start = end.spot.start
                elif end.has_score and (target is not None or method.gradient is not None):
                    start = score().start
                else:
                    start = evenly(end.output).to(dtype)
                scores = [score()] if method.gradient == "score" else layer_scores if method.gradient else []
                back = Backward(tape, images, start, end.value, scores)
                with without_autocast(images.device):
                    if not found:
                        sinks = find_sinks(tape, partial(_placed, back))
                    back.sinks = sinks
                    found[name] = method.find(back, **methods[name])
                end.check_grid(found[name].maps)
            if show is not None:
                show(Trace(tape, recorder, back.passed))
            channels = back.grid.channels
    finally:
        if show is None:
            tape.clear()
    _check_finite(found)
    return _explained(model, images, chosen, found, end, sinks, channels)


def _record(
    recorder: Recorder,
    model: nn.Module,
    images: Tensor,
    asked: Classes | Asked,
    inputs: Inputs,
    methods: Iterable[Method],
) -> tuple[End, list[Score]]:
    """Run the model on the tape; returns the end, and the score of each layer where a method reads these."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    lens = LogitLens(model) if any(method.gradient == "layer scores" for method in methods) else None
    if lens is not None and isinstance(asked, Asked):
        raise VitxError(
            "legrad scores each layer by the model's own head, which knows classes alone: take another "
            "method for this target"
        )
    pixels = images.detach().as_subclass(Tensor).clone()  # some models change their input
    recorder.begin(pixels)
    with recorder.recording(), nullcontext() if lens is None else lens.watch():
        end = run(recorder, model, pixels, asked, inputs)
    end = located(end, recorder.tape, len(images), dtype)
    if lens is None:
        return end, []
    with recorder.recording():
        logits = _layer_logits(lens, len(recorder.tape.layers), end.output)
    return end, [score_of(recorder.get(own), end.total, own, dtype) for own in logits]


def _explained(
    model: nn.Module,
    images: Tensor,
    methods: Mapping[str, Method],
    found: Mapping[str, Attribution],
    end: End,
    sinks: Sinks | None,
    channels: int | None,
) -> dict[str, Explanation]:
    """Return the explanation of each method, from its maps and the end of the pass."""
    logits, classes, captions = end.of_each(len(images))
    mean, std = normalization(model)
    return {
        name: Explanation(
            maps=one.maps,
            logits=logits,
            target=classes if methods[name].gradient else None,
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
            sinks=None if sinks is None else sinks.marked(one.maps),
        )
        for name, one in found.items()
    }


def _placed(back: Backward, found: Iterable[tuple[Value, Tensor]]) -> Tensor:
    return back.place(found).maps


def _common_fusion(chosen: Mapping[str, Method], methods: Methods) -> str | None:
    """Return the head fusion that all methods share, if they read nothing else of A."""
    fusions = [method.head_fusion(methods[name]) for name, method in chosen.items()]
    return fusions[0] if all(other == fusions[0] for other in fusions) else None


def _layer_logits(lens: LogitLens, layers: int, logits: Tensor) -> list[Tensor]:
    """Return the logits of each layer, (B, classes), by the head of the model."""
    of_layers = lens.logits()
    if len(of_layers) != layers or any(found.shape != logits.shape for found in of_layers):
        shapes = sorted({tuple(found.shape) for found in of_layers})
        raise VitxError(
            f"found {len(of_layers)} blocks with scores of shape {shapes}, {layers} attentions "
            f"and an output of shape {tuple(logits.shape)}: legrad needs one attention in each block, and "
            "the model's own head at its end"
        )
    return of_layers


def _check_finite(found: Mapping[str, Attribution]) -> None:
    for name, one in found.items():
        bad = (~one.maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise VitxError(
                f"the {name} maps of images {bad} are not finite: the images or the weights hold NaN or "
                "infinite values"
            )
