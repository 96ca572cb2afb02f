"""The attention of a model in one image: A of each layer, packed, and where its tokens lie."""

from collections.abc import Callable
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


def see(
    model: nn.Module, image: Tensor, run: Callable[..., Any], images: int = 1
) -> tuple[dict[str, Any], Tensor | None]:
    """Record a pass on one image.

    Args:
        model: as it was explained.
        image: (1, ...).
        run: how the model takes it.
        images: how many share the page.

    Returns:
        The layers, in the order of `Trace.attentions`, and the names of the tokens that the model brings, as
        the page unpacks them; and the output, None where it has no row for the image.

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
    return {
        "shape": attention.weights.shape[2:],
        "grids": [queries.grid, keys.grid],
        "own": keys.own if keys.own == queries.own else 0,
        "cells": [encoded(one.of.int()) for one in lattice],
        **packed(attention.weights.matrix(), attention.layout.count("D")),
    }


def _names(back: Backward, attention: Attention, keys: Cells) -> list[str]:
    """Names the tokens that the model brings: the first one that the output reads is the class token.

    Where it reads none of them, as the mean of the patches, the names of the parameters tell; so of the token
    of a distillation, which comes next.
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
