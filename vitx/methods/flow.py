"""Attention flow."""

import torch

from vitx.errors import VitxError
from vitx.functional.flow import capacities, flows
from vitx.functional.fusing import check_options
from vitx.methods.registry import register
from vitx.models.isolation import without_autocast
from vitx.tape.attention import Attention
from vitx.tape.backward import Attribution, Backward
from vitx.tape.residual import to_stream
from vitx.tape.walk import marks


@register("flow", fused_heads=True, title="attention flow", slow=True)
def flow(back: Backward, *, head_fusion: str = "mean", start_layer: int = 0) -> Attribution:
    """Attention flow, see `vitx.attention_flow`."""
    check_options(head_fusion)
    attentions = [one for layer in back.counting(start_layer) for one in layer.attentions]
    read = back.read_out()
    _check_chain(back, attentions, len(read))
    ((_, readout),) = read
    with torch.no_grad(), without_autocast(readout.device):
        layers = [capacities(one.weights.tiles(), readout, head_fusion) for one in attentions]
    first = attentions[0]
    return back.place([(first.inputs[0], first.to_values(flows(layers, readout)))])


def _check_chain(back: Backward, attentions: list[Attention], ends: int) -> None:
    """Raises a VitxError unless the attentions follow one another, on the same tokens in the same order."""
    shapes = sorted({tuple(one.weights.shape[dim] for dim in (0, 2, 3)) for one in attentions})
    images, queries, keys = shapes[0]
    follow = ends == len(shapes) == 1 and queries == keys
    if follow:
        tokens = marks((images, queries)).to(attentions[0].weights.device, attentions[0].weights.dtype)
        places = [back.place([(one.inputs[0], one.to_values(tokens))]).maps for one in attentions]
        for one in attentions:
            sizes = {residual: residual.outputs[0].shape for residual in one.residuals}
            even = tokens.new_tensor(tokens.numel() / sum(size.numel() for size in sizes.values()))
            sent = (to_stream(back.tape, end, even.expand(size), one, tokens) for end, size in sizes.items())
            places.append(back.place([pair for pairs in sent for pair in pairs]).maps)
        follow = len(places[0]) == images and all(
            place.shape == places[0].shape and torch.allclose(place, places[0], rtol=1e-4) for place in places
        )
    if not follow:
        raise VitxError(
            "attention flow takes layers that follow one another, in which all tokens of an image attend to "
            "each other: this model divides, merges or drops tokens, or has attentions side by side (images, "
            f"queries and keys of its layers: {shapes})"
        )
