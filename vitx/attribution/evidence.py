"""Evidence for and against a class."""

from math import lcm

import torch
from torch import Tensor

from vitx.attribution.registry import register
from vitx.functional.tiles import Tile
from vitx.tape.attention import Attention
from vitx.tape.backward import Attribution, Backward
from vitx.tape.expanded import ratio
from vitx.tape.grid import divided
from vitx.tape.values import Value

_BELOW = 1e-6  # share of the largest value below which a map shows negative entries


@register("evidence", gradient="score", accounts=True)
def evidence(back: Backward, *, start_layer: int = 0) -> Attribution:
    """Compute the contribution of each patch to the score in the linearized network, from two accounts.

    The first is that of its content after each residual, x * dS/dx (summed over the blocks as in Mehri et al.
    2025, arXiv 2411.16760). The second, A * G, is what attention moves from it to the tokens that the output
    reads. Each is divided by the sum of its absolute values. `ranked` turns their sum into a map.
    """
    layers = back.counting(start_layer) if back.layers else []
    attentions = [one for layer in layers for one in layer.attentions]
    rows = back.rows_read(attentions) if attentions else []
    taken = [_taken(back, one, read) for one, read in zip(attentions, rows, strict=True) if read.any()]
    accounts = [back.place(found).maps for found in (taken, back.contributions(start_layer)) if found]
    grid = [lcm(*counts) for counts in zip(*(maps.shape[1:] for maps in accounts), strict=True)]
    sizes = [maps.abs().sum(tuple(range(1, maps.ndim)), keepdim=True) for maps in accounts]
    shares = [ratio(maps, size) for maps, size in zip(accounts, sizes, strict=True)]
    signed = torch.stack([divided(share, grid) for share in shares]).sum(0)
    return Attribution(ranked(signed), back.accounted().expand(len(signed)), signed)


def _taken(back: Backward, attention: Attention, read: Tensor) -> tuple[Value, Tensor]:
    """Sum A * G over heads and the rows to read, (T, Q): what attention moves from each token to these."""
    some = read.any(0).nonzero().flatten().tolist()

    def taken(tile: Tile) -> Tensor:
        product, rows = tile.weights * tile.gradient, read[tile.images, tile.rows]
        return (product if rows.all() else product * rows[:, None, :, None].to(product)).sum((1, 2))

    return back.add_up(attention, taken, gradient=True, rows=slice(some[0], some[-1] + 1))


def ranked(signed: Tensor) -> Tensor:
    """Turn a signed map into one that is >= 0 in the same order: negative entries rank below all others."""
    above, below = signed.clamp(min=0), signed.clamp(max=0)
    whole = tuple(range(1, signed.ndim))
    top, lowest = above.amax(whole, keepdim=True), below.amin(whole, keepdim=True)
    height = 1 - below / torch.where(lowest == 0, -1, lowest)
    return above + torch.where(top > 0, _BELOW * top, -lowest) * height
