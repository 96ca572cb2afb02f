"""Attention flow."""

import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.flow import Flow
from vitx.functional.fusing import check_options
from vitx.methods.registry import register
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention
from vitx.tape.backward import Attribution, Backward


@register("flow", fused_heads=True, title="attention flow", slow=True)
def flow(back: Backward, *, head_fusion: str = "mean", start_layer: int = 0) -> Attribution:
    """Attention flow, see `vitx.attention_flow`."""
    check_options(head_fusion)
    layers = [one for layer in back.counting(start_layer) for one in layer.attentions]
    read = back.read_out()
    _check_chain(back, layers, len(read))
    ((_, readout),) = read
    flow = Flow(readout, head_fusion)
    for layer in reversed(layers):
        with torch.no_grad(), without_autocast(readout.device):
            for tile in layer.weights.tiles():
                flow.read(tile)
        flow.end_layer()
    return back.place([(layers[0].inputs[0], layers[0].to_values(flow.relevance))])


def _check_chain(back: Backward, layers: list[Attention], ends: int) -> None:
    """Raises a VitxError unless the layers follow one another, on the same tokens in the same order."""
    shapes = sorted({tuple(layer.weights.shape[i] for i in (0, 2, 3)) for layer in layers})
    follow = ends == 1 and len(shapes) == 1 and shapes[0][1] == shapes[0][2]
    if follow:
        images, tokens, _ = shapes[0]
        generator = torch.Generator().manual_seed(0)
        marks = torch.rand(images, tokens, generator=generator).to(layers[0].weights.device)
        ends_of = [
            ((one.inputs[0], one.to_values(marks)), (one.inputs[1], one.to_rows(marks))) for one in layers
        ]
        places = [back.place([side]).maps for sides in ends_of for side in sides]
        follow = len(places[0]) == images and all(_same(place, places[0]) for place in places)
    if not follow:
        raise VitxError(
            "attention flow takes layers that follow one another, in which all tokens of an image attend to "
            "each other: this model divides, merges or drops tokens, or has attentions side by side (images, "
            f"queries and keys of its layers: {shapes})"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4)
