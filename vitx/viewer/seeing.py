"""What a model attends to in one image: A of each layer, packed, and where its tokens lie."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitx.errors import VitxError
from vitx.models.given import ALONE
from vitx.models.isolation import untouched
from vitx.models.prediction import read_logits
from vitx.tape.attention import Attention
from vitx.tape.backward import Backward
from vitx.tape.lattice import NOWHERE, Cells, cells
from vitx.tape.output import NO_ATTENTION, evenly
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.trace import Trace
from vitx.targets.outputs import main
from vitx.viewer.packing import encoded, most_bytes, packed

LARGEST = 200 * 2**20  # bytes of a page, beyond which browsers give up
NO_GRID = "The tokens of this layer have no grid in the picture, so there is nothing to point at."


@dataclass(frozen=True)
class Seen:
    """What was seen of one image.

    Attributes:
        layers: of the attentions of `Trace.attentions`, in that order, what the page unpacks.
        own: the names of the tokens that the model brings.
        output: what the model put out for the image; None: nothing that has a row for it.
    """

    layers: list[dict[str, Any]]
    own: list[str]
    output: Tensor | None


def see(model: nn.Module, image: Tensor, run: Callable[..., Any], images: int = 1) -> Seen:
    """Records a pass on one image.

    Args:
        model: as it was explained.
        image: (1, ...).
        run: how the model takes it.
        images: how many share the page.

    Raises:
        VitxError: There is no attention between tokens, none of them lies in a grid, or the page would be
            too large.
    """
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
                    f"the page would have {size >> 20} MiB, and a browser takes {LARGEST >> 20}: show fewer "
                    "images, as explanation[:1].view(), or smaller ones"
                )
            back = _way_back(recorder, pixels, output)
            lattices = cells(tape, attentions, back.grid.channels)
            if not any(keys.grid for _, keys in lattices):
                raise VitxError(
                    "no layer has tokens that lie in a grid of the picture: a page cannot show it"
                )
            layers = [_layer(*one) for one in zip(attentions, lattices, strict=True)]
            names = _names(back, attentions, [keys for _, keys in lattices])
            return Seen(layers, names, main(output))
        finally:
            tape.clear()


def _way_back(recorder: Recorder, pixels: Tensor, output: Any) -> Backward:
    found = read_logits(output, pixels, recorder.made_last)
    value = recorder.get(found)
    assert value is not None
    return Backward(recorder.tape, pixels, evenly(found), value)


def _layer(attention: Attention, lattice: tuple[Cells, Cells]) -> dict[str, Any]:
    queries, keys = lattice
    if not (queries.grid and keys.grid):
        return {"why": NO_GRID}
    return {
        "shape": attention.weights.shape[2:],
        "grids": [queries.grid, keys.grid],
        "own": keys.own if keys.own == queries.own else 0,
        "cells": [encoded(one.of.int()) for one in lattice],
        **packed(attention.weights.matrix(), attention.layout.count("D")),
    }


def _names(back: Backward, attentions: list[Attention], keys: list[Cells]) -> list[str]:
    """Names the tokens that the model brings: the first one that the output reads is the class token.

    Where it reads none of them, as the mean of the patches, the model's own word for its weights tells; so of
    the token of a distillation, which comes next.
    """
    last = max(range(len(keys)), key=lambda number: (keys[number].own, number))
    count = keys[last].own
    if not count:
        return []
    (rows,) = back.rows_read([attentions[last]])
    brought = (keys[last].of[0] < 0) & (keys[last].of[0] != NOWHERE)
    read = rows[0][brought].tolist()
    called = " ".join(name.rpartition(".")[2] for name, _ in back.tape.model.named_parameters())
    says = "cls" in called or "class_" in called
    of_class = read.index(True) if True in read else 0 if says else None
    names = [f"register {number}" for number in range(count)]
    if of_class is not None:
        names[of_class:] = [
            "class token",
            *(["distillation token"] if "dist" in called else []),
            *names[of_class:],
        ]
    return names[:count]
