"""The page of an explanation: records the attention again, and adds other methods and classes."""

from collections.abc import Callable, Mapping, Sequence, Set
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from vitx.attribution import find_method, title_of
from vitx.errors import VitxError
from vitx.explanation import Explanation
from vitx.models.given import ALONE
from vitx.models.isolation import untouched
from vitx.models.outputs import declared_classes, main
from vitx.models.prediction import forward, read_logits
from vitx.pictures.captions import captions_said, classes_said
from vitx.tape.attention import Attention
from vitx.tape.backward import Backward
from vitx.tape.recorder import Recorder
from vitx.tape.score import NO_ATTENTION, evenly
from vitx.tape.tape import Tape
from vitx.targets.question import Question
from vitx.tracing import Trace
from vitx.viewer.lattice import NOWHERE, Cells, cells
from vitx.viewer.page import Page, encoded, halves, most_bytes, packed, page, sheet

_METHODS = "evidence", "grad_rollout", "rollout"  # besides the explanation's own
_CLASSES = 3  # explained for each image
_ALIKE = 0.02  # of the largest output: tolerance for other precisions or batches
LARGEST = 200 * 2**20  # bytes of a page: browsers fail on larger ones
NO_GRID = "The tokens of this layer have no grid in the picture, so there is nothing to point at."

Explain = Callable[..., dict[str, Explanation]]
Forward = Callable[..., Any]


def view(
    reference: "ref[nn.Module]",
    options: Mapping[str, Any],
    target: Any,
    explain: Explain,
    found: Explanation,
    names: Sequence[str] | None = None,
) -> Page:
    """Make the page of an explanation that holds its images; `explain` is `vitx.explain_methods`."""
    model = reference()
    if model is None:
        raise VitxError("the model that was explained is gone: keep it as long as you view its explanation")
    found = found.to(next(model.parameters(), found.maps).device)
    assert found.images is not None
    run: Forward = forward
    if isinstance(target, Question):
        with torch.no_grad(), untouched(model):
            run = target.put(model, found.images[:: 1 + found.paired]).forward
    of_class = not (isinstance(target, Question) or callable(target))
    seen = [_see(model, image, run, len(found.images)) for image in found.images.split(1)]
    if not all(_is_same(output, logits) for (_, output), logits in zip(seen, found.logits, strict=True)):
        raise VitxError(
            "the outputs of the model have changed since it was explained, as after further training: "
            "explain again, and view the result before the model changes"
        )
    declared = set(declared_classes(model))
    names = names or found.class_names or None
    classes = _classes(found, declared) if of_class else None
    slots = _explained(model, found, options, classes, explain)
    captions = [str(said) for said in captions_said(found.logits, found.captions, names)]
    targets = [[one] for one in captions] if classes is None else _targets(found.logits, classes, names)
    if found.captions is None:
        captions = [said and f"predicted: {said}" for said in captions]
        if found.logits.ndim == 2 and found.logits.shape[1] not in {1, *declared} and not names:
            best = classes_said(found.logits, found.logits.argmax(1), names)  # they may be features
            captions = [f"largest output: {one}" for one in best]
    images = []
    for number, ((attention, _), pixels) in enumerate(zip(seen, found.pixels().numpy(), strict=True)):
        grids = [found.maps.shape[1:], *(one["grids"][1] for one in attention["layers"] if "grids" in one)]
        marked = () if found.sinks is None else found.sinks[number].flatten().nonzero()[:, 0].tolist()
        sinks = {"grid": found.maps.shape[1:], "cells": marked}
        maps = [_map(by, number, slot) for slot, some in enumerate(slots) for by in some]
        about = {"caption": captions[number], "targets": targets[number], "maps": maps, "sinks": sinks}
        images.append(sheet(pixels, max(prod(grid[:-2]) for grid in grids)) | about | attention)
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") or type(model).__name__
    return page(name, images, [(by.method, title_of(by.method)) for by in slots[0]])


def _is_same(output: Tensor | None, logits: Tensor) -> bool:
    """Return whether an output is the logits that were explained, or cannot be compared with them."""
    if output is None or output.shape[1:] != logits.shape or not output.is_floating_point():
        return True
    return bool((output[0].to(logits) - logits).abs().max() <= _ALIKE * logits.abs().max())


def _classes(found: Explanation, declared: Set[int]) -> Tensor | None:
    """Return the classes to explain for each image, (B, n): its target, then the most probable others."""
    logits, own = found.logits, found.target
    if logits.ndim == 2 and logits.shape[1] > 1:
        own = logits.argmax(1) if own is None else own
        if logits.shape[1] in declared:  # else they may be features
            return logits.scatter(1, own[:, None], torch.inf).topk(min(_CLASSES, logits.shape[1])).indices
    return None if own is None else own[:, None]


def _explained(
    model: nn.Module, found: Explanation, options: Mapping[str, Any], classes: Tensor | None, explain: Explain
) -> list[list[Explanation]]:
    """Return explanations by all methods, the given one first, and a further list for each other class."""
    asked = {found.method: options} | {name: {} for name in _METHODS if name != found.method}
    slots = [[found]]
    for slot, target in enumerate(() if classes is None else classes.T):
        names = [n for n in asked if (find_method(n).gradient if slot else n != found.method)]
        try:
            more = explain(model, found.images, {n: asked[n] for n in names}, target=target.tolist())
        except VitxError:  # the model may support no other method
            continue
        if slot:
            slots.append([])
        slots[-1] += more.values()
    return slots


def _targets(logits: Tensor, classes: Tensor, names: Sequence[str] | None) -> list[list[str]]:
    """Name the classes of each image, with probabilities unless there is a single logit."""
    found = []
    for row, target in zip(logits, classes, strict=True):
        known = map(str, classes_said(logits, target, names))
        said = [f"class {one}" if one.isdecimal() else one for one in known]
        if row.numel() > 1:
            shares = row.softmax(0)[target].tolist()
            said = [f"{one} ({share:.1%})" for one, share in zip(said, shares, strict=True)]
        found.append(said)
    return found


def _map(by: Explanation, number: int, slot: int) -> dict[str, Any]:
    """Return a map of one image as the page reads it; `target` is None if the map has no class."""
    target = slot if find_method(by.method).gradient else None
    against = None if by.signed is None else halves(by.signed[number])
    numbers = {"grid": by.maps.shape[1:], "values": halves(by.maps[number]), "against": against}
    return {"method": by.method, "target": target, **numbers}


def _see(model: nn.Module, image: Tensor, run: Forward, images: int) -> tuple[dict[str, Any], Tensor | None]:
    """Record a pass on one of this many images; return its attention and the output of the model."""
    tape = Tape(model)
    recorder = Recorder(tape)
    with torch.inference_mode(False), torch.no_grad(), untouched(model):
        try:
            pixels = image.detach().as_subclass(Tensor).clone()
            recorder.begin(pixels)
            with recorder.recording():
                output = run(model, pixels, ALONE)
            attentions = Trace(tape, recorder).self_attentions
            if not attentions:
                raise VitxError(NO_ATTENTION)
            size = images * sum(most_bytes(one.weights.shape, one.layout.count("D")) for one in attentions)
            if size > LARGEST:
                raise VitxError(
                    f"the page would have {size >> 20} MiB, but browsers take {LARGEST >> 20}: show fewer "
                    "images, as explanation[:1].view(), or smaller ones"
                )
            read = read_logits(output, pixels, recorder.made_last)
            value = recorder.get(read)
            assert value is not None
            back = Backward(tape, pixels, evenly(read), value)
            lattices = cells(tape, attentions, back.grid.channels)
            if not any(keys.grid for _, keys in lattices):
                raise VitxError(
                    "no layer has tokens that lie in a grid of the picture: a page cannot show it"
                )
            layers = [_layer(*one) for one in zip(attentions, lattices, strict=True)]
            last = max(range(len(lattices)), key=lambda number: (lattices[number][1].own, number))
            names = _names(back, attentions[last], lattices[last][1])
            return {"layers": layers, "own": names}, main(output)
        finally:
            tape.clear()


def _layer(attention: Attention, lattice: tuple[Cells, Cells]) -> dict[str, Any]:
    queries, keys = lattice
    if not (queries.grid and keys.grid):
        return {"why": NO_GRID}
    own, of = keys.own if keys.own == queries.own else 0, [encoded(one.of.int()) for one in lattice]
    places = {"grids": [queries.grid, keys.grid], "own": own, "cells": of}
    matrix, channels = attention.weights.matrix(), attention.layout.count("D")
    return {"shape": attention.weights.shape[2:], **places, **packed(matrix, channels)}


def _names(back: Backward, attention: Attention, keys: Cells) -> list[str]:
    """Name the model's own tokens: the first one that the output reads is the class token.

    If it reads none, as when it averages patches, the names of parameters decide if there is one. They also
    decide if a distillation token comes next.
    """
    if not keys.own:
        return []
    (rows,) = back.rows_read([attention])
    read = rows[0][(keys.of[0] < 0) & (keys.of[0] != NOWHERE)].tolist()
    called = " ".join(name.rpartition(".")[2] for name, _ in back.tape.model.named_parameters())
    names = [f"register {number}" for number in range(keys.own)]
    if True in read or "cls" in called or "class_" in called:
        first = read.index(True) if True in read else 0
        names[first:first] = ["class token", "distillation token"][: 1 + ("dist" in called)]
    return names[: keys.own]
