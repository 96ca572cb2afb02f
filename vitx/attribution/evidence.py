"""Evidence for the class, and against it."""

from math import lcm

import torch
from torch import Tensor

from vitx.attribution.registry import register
from vitx.functional.tiles import Tile
from vitx.tape.attention import Attention
from vitx.tape.backward import Attribution, Backward
from vitx.tape.expanded import over
from vitx.tape.grid import divided
from vitx.tape.values import Value

_BELOW = 1e-6  # of the largest value: where what speaks against lies


@register("evidence", gradient="score", accounts=True)
def evidence(back: Backward, *, start_layer: int = 0) -> Attribution:
    """Contributions of each patch to the score in the linearized network, by two accounts shown as one.

    The first is the contribution of its content after each residual, x * dS/dx (as Mehri et al. 2025, arXiv
    2411.16760, sum it over the blocks). The second is what attention takes from it to the tokens that the
    output reads, A * G. Each is divided by the sum of its absolute values. See `ranked` for the map.
    """
    layers = back.counting(start_layer) if back.layers else []
    attentions = [one for layer in layers for one in layer.attentions]
    rows = back.rows_read(attentions) if attentions else []
    taken = [_taken(back, one, read) for one, read in zip(attentions, rows, strict=True) if read.any()]
    accounts = [back.place(found).maps for found in (taken, back.contributions(start_layer)) if found]
    grid = [lcm(*counts) for counts in zip(*(maps.shape[1:] for maps in accounts), strict=True)]
    sizes = [maps.abs().sum(tuple(range(1, maps.ndim)), keepdim=True) for maps in accounts]
    shares = [over(maps, size) for maps, size in zip(accounts, sizes, strict=True)]
    signed = torch.stack([divided(share, grid) for share in shares]).sum(0)
    return Attribution(ranked(signed), back.accounted().expand(len(signed)), signed)


def _taken(back: Backward, attention: Attention, read: Tensor) -> tuple[Value, Tensor]:
    """E[A * G] of the rows that are read, (T, Q): what their tokens take in from each other token."""
    some = read.any(0).nonzero().flatten().tolist()

    def taken(tile: Tile) -> Tensor:
        product, rows = tile.weights * tile.gradient, read[tile.images, tile.rows]
        return (product if rows.all() else product * rows[:, None, :, None].to(product)).sum((1, 2))

    return back.add_up(attention, taken, gradient=True, rows=slice(some[0], some[-1] + 1))


def ranked(signed: Tensor) -> Tensor:
    """Make a map, >= 0, of a signed one: entries below 0 keep their order, below all that are above.

    Example:
        >>> ranked(torch.tensor([[[2.0, -1.0], [-3.0, 0.0]]])).argsort().tolist()
        [[[1, 0], [0, 1]]]
        >>> ranked(torch.tensor([[[-2.0, -1.0, -4.0]]]))
        tensor([[[2., 3., 0.]]])
    """
    above, below = signed.clamp(min=0), signed.clamp(max=0)
    whole = tuple(range(1, signed.ndim))
    top, lowest = above.amax(whole, keepdim=True), below.amin(whole, keepdim=True)
    height = 1 - below / torch.where(lowest == 0, -1, lowest)
    return above + torch.where(top > 0, _BELOW * top, -lowest) * height
