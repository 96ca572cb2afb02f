"""The positions of an attention's tokens in the picture: each is in a cell of a grid, or nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from vitx.tape.attention import Attention, Scores
from vitx.tape.relevance import Placement, Propagation
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent

_APART = 0.1  # of a patch: tokens closer than this are in the same row
_MOST = 0.75  # of a token must come from pixels or, for the model's own tokens, from constants
NOWHERE = -(2**31)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of tokens, row by row.

    The model's own tokens, such as a class token, are numbered -1, -2, and so on; padding is `NOWHERE`.
    """

    grid: tuple[int, ...]  # (h, w), or (frames, h, w) for clips; empty if there is none
    of: Tensor  # (T, N), the cell of each token

    @property
    def own(self) -> int:
        """The number of the model's own tokens if all tokens attend to one another; else 0."""
        return int(((self.of < 0) & (self.of != NOWHERE)).sum()) if len(self.of) == 1 else 0


def cells(tape: Tape, attentions: Sequence[Attention], channels: int | None) -> list[tuple[Cells, Cells]]:
    """Find the cells of the queries and of the keys of some attentions, in a pass on one image.

    A token is at the pixels to which the residual stream leads back from it, bypassing all attention.
    """
    rows = []
    for one in attentions:
        like: Any = {"device": one.weights.device, "dtype": one.weights.dtype, "requires_grad": True}
        rows += [torch.ones(one.weights.shape[0], size, **like) for size in one.weights.shape[2:]]
    with torch.enable_grad():
        lattices = [_lattice(*one) for one in zip(*_moments(tape, attentions, rows, channels), strict=True)]
    return list(zip(lattices[::2], lattices[1::2], strict=True))


class _Placing(Propagation):
    """Propagation of positions; the output of an attention outside of residuals lies where its query does."""

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention):
            return self.to_queries(step, step.rows(arrived[0]))
        return super()._send(step, arrived)

    def to_queries(self, attention: Attention, rows: Tensor) -> list[tuple[Value, Tensor]]:
        """Send the relevance of the rows of A, (T, Q), to the queries of a fused kernel, or to A itself."""
        (values, asked), layout = attention.inputs, attention.layout
        if asked.is_constant:
            return []
        zero = rows.new_zeros(asked.shape, requires_grad=True)
        fused = attention.name.startswith("_scaled_dot_product")
        laid = layout.tokens_first(zero, "THQ") if fused else layout.grouped(zero, "THQK")
        (found,) = torch.autograd.grad(laid.mean((1, 3)), zero, rows, create_graph=True)
        scores = [step.outputs[0] for step in self._tape.steps if isinstance(step, Scores)]
        if not any(one.number > attention.last_residual and asked.made_from(one) for one in scores):
            return [(asked, found)]
        # Scores give half to the query and half evenly to all keys. Double it, and subtract the keys' half.
        keys = attention.weights.shape[3]
        evenly = (rows.sum(1, keepdim=True) / keys).expand(-1, keys)
        return [(asked, 2 * found), (values, -attention.to_values(evenly))]


def _moments(
    tape: Tape, attentions: Sequence[Attention], rows: Sequence[Tensor], channels: int | None
) -> list[tuple[Tensor, ...]]:
    """Return the shares of each token, (T, N), from constants and from pixels, and moments of the latter."""
    way, starts = _Placing(tape, Placement()), dict[Value, Tensor]()
    for one, queries, keys in zip(attentions, rows[::2], rows[1::2], strict=True):
        for value, part in (*way.to_queries(one, queries), (one.inputs[0], one.to_values(keys))):
            starts[value] = starts[value] + part if value in starts else part  # values may be shared
    arrived = way.run(starts).arrived
    nothing = 0 * rows[0].sum()
    brought = (one for value, one in arrived.items() if value.is_constant and one.ndim)  # padding is 0-d
    constants = sum((one.sum() for one in brought), nothing)
    pixels = arrived.get(tape.image, nothing.expand(tape.image.shape))[0]
    pixels = pixels if channels is None else pixels.sum(channels - 1)
    gradients = partial(torch.autograd.grad, inputs=rows, retain_graph=True, materialize_grads=True)
    found = [gradients(constants), gradients(pixels.sum())]
    for dim, size in enumerate(pixels.shape):
        places = (torch.arange(size, device=pixels.device, dtype=pixels.dtype) + 0.5) / size
        found.append(gradients((pixels.movedim(dim, -1) * places).sum()))
    return found


def _lattice(own: Tensor, mass: Tensor, *moments: Tensor) -> Cells:
    mass, brought = mass.cpu(), own.cpu() > _MOST
    placed = mass > _MOST
    of = torch.where(brought, -brought.long().cumsum(1), NOWHERE)
    places = [one.cpu()[placed] / mass[placed] for one in moments]
    apart = _APART / max(1, int(placed.sum())) ** (1 / len(places))
    for find in (_by_size, _by_rank, partial(_by_size, most_missing=3)):
        found = [find(one, apart) for one in places]
        grid = tuple(count for count, _ in found)
        parts = (level * prod(grid[dim + 1 :]) for dim, (_, level) in enumerate(found))
        flat = sum(parts, torch.zeros((), device="cpu"))
        if prod(grid) and (find is not _by_rank or prod(grid) == len(flat.unique())):
            break
    of[placed] = flat.long()
    ordered = of.sort(1).values
    shared = ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()  # two tokens of a window in one cell
    if not prod(grid) or shared:
        return Cells((), of.masked_fill(placed, NOWHERE))
    return Cells(grid, of)


def _by_size(places: Tensor, apart: float, most_missing: int = 0) -> tuple[int, Tensor]:
    """Return the number of rows, 0 if some token is not in the middle of one, and the row of each token.

    Up to `most_missing` rows may be missing between the nearest two, as tokens may have been dropped.
    """
    gaps = places.sort().values.diff()
    gaps = gaps[gaps > apart]
    least = round(1 / float(gaps.amin())) if len(gaps) else 1
    for times in range(1, most_missing + 2):
        level = places * least * times - 0.5
        if len(level) and bool((level - level.round()).abs().amax() < _APART):
            return least * times, level.round()
    return 0, places


def _by_rank(places: Tensor, apart: float) -> tuple[int, Tensor]:
    """Return the same for tokens that are closer together, as next to padding, if none was dropped."""
    order = places.sort()
    level = torch.zeros_like(places)
    level[order.indices] = (order.values.diff(prepend=order.values[:1]) > apart).to(level).cumsum(0)
    return (int(level.max()) + 1 if len(level) else 0), level
