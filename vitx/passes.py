"""One pass of a model, and the way back of each method that shares it."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor, nn

from vitx.attribution import Method, Methods, find_method
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.inputs.preprocessing import normalisation
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
from vitx.targets.reading import located, run

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
    """Explains by methods that share one forward pass, each of which has its own way back.

    Where the tape is to be shown, it stays.
    """
    chosen = {name: find_method(name) for name in methods}
    lens = LogitLens(model) if any(m.gradient == "layer scores" for m in chosen.values()) else None
    tape = Tape(
        model,
        network=network,
        accounts=any(method.accounts for method in chosen.values()),
        head_fusion=None if network else _common_fusion(chosen, methods),
        named=show is not None,
        together=inputs.together,
    )
    found: dict[str, Attribution] = {}
    kind = torch.promote_types(images.dtype, torch.float32)
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        try:
            asked_for = target.put(model, images) if isinstance(target, Question) else target
            if isinstance(asked_for, Asked):
                images = asked_for.images
                tape.ends = None if asked_for.cells is None else {}
            pixels = images.detach().as_subclass(Tensor).clone()  # some models change their input
            recorder = Recorder(tape)
            recorder.begin(pixels)
            with recorder.recording(), nullcontext() if lens is None else lens.watch():
                end = run(recorder, model, pixels, asked_for, inputs)
            end = located(end, tape, len(images), kind)
            of_logits = cache(partial(end.score, kind))
            asked: dict[str | None, list[Score]] = {None: []}  # what is differentiated
            if any(method.gradient == "score" for method in chosen.values()):
                asked["score"] = [of_logits()]
            if lens is not None:
                if isinstance(asked_for, Asked):
                    raise VitxError(
                        "legrad scores classes layer by layer: take another method for this target"
                    )
                with recorder.recording():
                    layers = _layer_logits(lens, len(tape.layers), end.output)
                asked["layer scores"] = [score_of(recorder.get(own), end.total, own, kind) for own in layers]
            sinks: Sinks | None = None
            for number, (name, method) in enumerate(chosen.items()):
                reads = end.has_score and (target is not None or method.gradient is not None)
                if end.spot is not None:
                    start = end.spot.start
                else:
                    start = of_logits().start if reads else evenly(end.output).to(kind)
                back = Backward(tape, images, start, end.value, asked[method.gradient])
                with without_autocast(images.device):
                    if number == 0:
                        sinks = find_sinks(tape, partial(_placed, back), back.grid.embedded)
                    back.sinks = sinks
                    found[name] = method.find(back, **methods[name])
                end.check_grid(found[name].maps)
            channels = back.grid.channels
            if show is not None:
                show(Trace(tape, recorder, back.passed))
        finally:
            if show is None:
                tape.clear()
    _check_finite({name: one.maps for name, one in found.items()})
    size = tuple(count for dim, count in enumerate(images.shape) if dim not in (0, channels))
    logits, classes, captions = end.of_each(len(images))
    mean, std = normalisation(model)
    explained = {}
    for name, one in found.items():
        about = classes if chosen[name].gradient else None
        explained[name] = Explanation(
            *(one.maps, logits, about, size, images, mean, std, name, one.conservation, one.signed, channels),
            captions=captions,
            boxes=end.boxes,
            paired=end.paired,
            objects=end.objects,
            sinks=None if sinks is None else sinks.marked(one.maps),
        )
    return explained


def _placed(back: Backward, found: Iterable[tuple[Value, Tensor]]) -> Tensor:
    return back.place(found).maps


def _common_fusion(chosen: Mapping[str, Method], methods: Methods) -> str | None:
    """Returns how the heads are fused by all methods, if they read nothing else of A."""
    fusions = [method.head_fusion(methods[name]) for name, method in chosen.items()]
    return fusions[0] if all(other == fusions[0] for other in fusions) else None


def _layer_logits(lens: LogitLens, layers: int, logits: Tensor) -> list[Tensor]:
    """Returns what the head makes of each layer, (B, classes)."""
    of_layers = lens.logits()
    if len(of_layers) != layers or any(found.shape != logits.shape for found in of_layers):
        shapes = sorted({tuple(found.shape) for found in of_layers})
        raise VitxError(
            f"found {len(of_layers)} blocks with scores of shape {shapes}, {layers} attentions "
            f"and an output of shape {tuple(logits.shape)}: legrad needs one attention in each block, and "
            "the model's own head at its end"
        )
    return of_layers


def _check_finite(found: Mapping[str, Tensor]) -> None:
    for name, maps in found.items():
        bad = (~maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            raise VitxError(
                f"the {name} maps of images {bad} are not finite: the images or the weights hold NaN or "
                "infinite values"
            )
