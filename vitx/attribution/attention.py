"""Attention itself: that of the last layer, its flow through all layers, and the sensitivity to it."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from vitx.attribution.registry import register
from vitx.errors import VitxError
from vitx.functional.flow import capacities, flows
from vitx.functional.fusing import carry, fused
from vitx.functional.tiles import Tile
from vitx.tape.attention import Attention
from vitx.tape.backward import Attribution, Backward
from vitx.tape.relevance import to_stream
from vitx.tape.walk import marks


@register("attention", fused_heads=True)
def attention(back: Backward, *, head_fusion: str = "mean") -> Attribution:
    """Compute readout^T fuse(A) of the last layer alone (Caron et al. 2021, arXiv 2104.14294, figure 1)."""
    found = []
    for one, readout in back.read_out(head_fusion):
        attended = readout.new_zeros(len(readout), one.weights.shape[3])
        weights = one.weights if head_fusion == "mean" else back.heads(one)
        for images, rows, matrix in fused(weights.tiles(), head_fusion):
            attended[images] += carry(readout[images][:, rows], matrix[:, None])
        found.append((one.inputs[0], one.to_values(attended)))
    return back.place(found, head_fusion)


@register("legrad", gradient="layer scores", title="LeGrad")
def legrad(back: Backward, *, start_layer: int = 0, gradient: str = "linearised") -> Attribution:
    """Average relu(d s_l / d A_l) over layers l, heads and queries, where s_l is the layer's own score.

    See Bousselham et al. 2025, arXiv 2404.03214, eq. 6 to 9. Only the gradient enters, not A_l itself.
    """
    layers = back.counting(start_layer)

    def raised(tile: Tile) -> Tensor:
        return tile.gradient.relu().sum((1, 2)) / (len(layers) * tile.of_heads * tile.gradient.shape[3])

    attentions = [one for layer in layers for one in layer.attentions]
    return back.place([back.add_up(one, raised, gradient=True) for one in attentions])


@register("flow", fused_heads=True, title="attention flow", slow=True)
def flow(back: Backward, *, head_fusion: str = "mean", start_layer: int = 0) -> Attribution:
    """Compute attention flow, see `vitx.attention_flow`."""
    attentions = [one for layer in back.counting(start_layer) for one in layer.attentions]
    shapes = sorted({(one.weights.shape[0], *one.weights.shape[2:]) for one in attentions})
    read = back.read_out(head_fusion)
    if len(read) > 1 or len(shapes) > 1 or shapes[0][1] != shapes[0][2] or not _follow(back, attentions):
        raise VitxError(
            "attention flow takes layers that follow one another, in which all tokens of an image attend to "
            "each other: this model divides, merges or drops tokens, or has attentions side by side (images, "
            f"queries and keys of its layers: {shapes})"
        )
    layers = [capacities(one.weights, head_fusion) for one in attentions]
    first, ((_, readout),) = attentions[0], read
    return back.place([(first.inputs[0], first.to_values(flows(layers, readout)))], head_fusion)


def _follow(back: Backward, attentions: Sequence[Attention]) -> bool:
    """Return True if the queries and keys of all attentions are the same tokens, in the same order."""
    weights = attentions[0].weights
    tokens = marks((weights.shape[0], weights.shape[2])).to(weights.device, weights.dtype)
    maps = []
    for one in attentions:
        sums = [(residual, residual.outputs[0].shape) for residual in one.residuals]
        even = tokens.new_tensor(tokens.numel() / sum(shape.numel() for _, shape in sums))
        kept = (to_stream(back.tape, residual, even.expand(shape), one, tokens) for residual, shape in sums)
        maps.append(back.place([(one.inputs[0], one.to_values(tokens))]).maps)
        maps.append(back.place(chain.from_iterable(kept)).maps)
    alike = all(one.shape == maps[0].shape and torch.allclose(one, maps[0], rtol=1e-4) for one in maps)
    return alike and len(maps[0]) == weights.shape[0]
