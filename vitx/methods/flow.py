"""Attention flow."""

import torch
from torch import Tensor

from vitx.attention.fusing import check_options
from vitx.errors import VitxError
from vitx.methods.registry import register
from vitx.models.isolation import without_autocast
from vitx.relevance.attending import Attended
from vitx.relevance.max_flow import Flow
from vitx.relevance.way_back import Found, Way


@register("flow", fused_heads=True, title="attention flow", slow=True)
def flow(way: Way, *, head_fusion: str = "mean", start_layer: int = 0) -> Found:
    """Attention flow, see `vitx.attention_flow`."""
    check_options(head_fusion)
    layers = way.counting(start_layer)
    read = way.read_out(head_fusion)
    _check_chain(way, layers, len(read))
    ((_, readout),) = read
    flow = Flow(readout, head_fusion)
    for layer in reversed(layers):
        with torch.no_grad(), without_autocast(readout.device):
            for tile in layer.call.attention.tiles():
                flow.read(tile)
        flow.end_layer()
    return way.place([(layers[0].values, flow.relevance)])


def _check_chain(way: Way, layers: list[Attended], ends: int) -> None:
    """Raises a VitxError unless the layers follow one another, on the same tokens in the same order."""
    shapes = sorted({tuple(layer.call.attention.shape[i] for i in (0, 2, 3)) for layer in layers})
    follow = ends == 1 and len(shapes) == 1 and shapes[0][1] == shapes[0][2]
    if follow:
        images, tokens, _ = shapes[0]
        generator = torch.Generator().manual_seed(0)
        marks = torch.rand(images, tokens, generator=generator).to(layers[0].values)
        places = [way.place([(side, marks)]).maps for one in layers for side in (one.values, one.weights)]
        follow = len(places[0]) == images and all(_same(place, places[0]) for place in places)
    if not follow:
        raise VitxError(
            "attention flow takes layers that follow one another, in which all tokens of an image attend to "
            "each other: this model divides, merges or drops tokens, or has attentions side by side (images, "
            f"queries and keys of its layers: {shapes})"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4)
