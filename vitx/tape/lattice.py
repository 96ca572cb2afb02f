"""Where the tokens of an attention lie in the picture: each in a cell of a grid, or nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from vitx.tape.attention import Attention
from vitx.tape.expanded import summed
from vitx.tape.relevance import Propagation
from vitx.tape.tape import Tape
from vitx.tape.values import Step, Value
from vitx.tape.walk import Sent

_APART = 0.1  # of a patch: nearer tokens are in the same row
_MOST = 0.75  # of a token has to come from pixels, or it is one of the model's own
_SPARSE = 4  # cells for each token, if some were dropped; with more of them it is no grid
NOWHERE = -(2**31)


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of tokens.

    Attributes:
        grid: (h, w), behind the number of frames of clips; empty where the tokens have no grid.
        of: (T, N), the cell of each token, row by row; of one that the model brings, as a class token,
            -1 less its number among these; of padding, `NOWHERE`.
    """

    grid: tuple[int, ...]
    of: Tensor

    @property
    def own(self) -> int:
        """How many tokens the model brings, where all of them attend to one another; else 0."""
        return int(((self.of < 0) & (self.of != NOWHERE)).sum()) if len(self.of) == 1 else 0


def cells(tape: Tape, attentions: Sequence[Attention], channels: int | None) -> list[tuple[Cells, Cells]]:
    """Finds the cells of the queries and of the keys of some attentions, in a pass on one image.

    A token lies where the residuals lead to from it, past all attention.
    """
    rows = [torch.ones(one.weights.shape[0], size, device=one.weights.device, dtype=one.weights.dtype)
            for one in attentions for size in one.weights.shape[2:]]  # fmt: skip
    with torch.enable_grad():
        for leaf in rows:
            leaf.requires_grad_()
        found = _moments(tape, attentions, rows, channels)
    lattices = [_lattice(*one) for one in zip(*found, strict=True)]
    pairs = []
    for one, queries, keys in zip(attentions, lattices[::2], lattices[1::2], strict=True):
        alike = one.weights.shape[2] == one.weights.shape[3] and bool(queries.of.ge(0).any())
        pairs.append((keys if alike else queries, keys))
    return pairs


class _Lying(Propagation):
    """Relevance that keeps its place; what an attention in no residual puts out lies where its query does."""

    def _send(self, step: Step, arrived: list[Tensor]) -> Sent:
        if isinstance(step, Attention):
            return _to_queries(step, summed(step.arrived(arrived[0]), [1, 3]))
        return super()._send(step, arrived)


def _moments(
    tape: Tape, attentions: Sequence[Attention], rows: Sequence[Tensor], channels: int | None
) -> list[list[Tensor]]:
    """Returns how much of each token, (T, N), comes from constants and from pixels, and where these lie."""
    starts: dict[Value, Tensor] = {}
    for one, queries, keys in zip(attentions, rows[::2], rows[1::2], strict=True):
        for value, part in (*_to_queries(one, queries), (one.inputs[0], one.to_values(keys))):
            starts[value] = starts[value] + part if value in starts else part  # more than one asks for it
    arrived = _Lying(tape, None).run(starts).arrived
    nothing = 0 * rows[0].sum()
    brought = (one for value, one in arrived.items() if value.is_constant and one.ndim)  # none for padding
    constants = sum((one.sum() for one in brought), nothing)
    pixels = arrived.get(tape.image, nothing.expand(tape.image.shape))[0]
    pixels = pixels if channels is None else pixels.sum(channels - 1)
    found = [_gradients(constants, rows), _gradients(pixels.sum(), rows)]
    for dim, size in enumerate(pixels.shape):
        places = (torch.arange(size, device=pixels.device, dtype=pixels.dtype) + 0.5) / size
        found.append(_gradients((pixels.movedim(dim, -1) * places).sum(), rows))
    return found


def _gradients(total: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, rows, retain_graph=True, materialize_grads=True))


def _to_queries(attention: Attention, rows: Tensor) -> list[tuple[Value, Tensor]]:
    """Sends what the rows of A have, (T, Q), to what asked: the queries of a kernel, or A itself."""
    asked, layout = attention.inputs[1], attention.layout
    if asked.is_constant:
        return []
    zero = rows.new_zeros(asked.shape, requires_grad=True)
    if attention.name.startswith("_scaled_dot_product"):
        laid = layout.tokens_first(zero)
    else:
        laid = layout.grouped(zero, "THQK")
    (found,) = torch.autograd.grad(laid.mean((1, 3)), zero, rows, create_graph=True)
    return [(asked, found)]


def _lattice(own: Tensor, mass: Tensor, *moments: Tensor) -> Cells:
    """Finds the grid of tokens from where they lie on the average."""
    mass, centres = mass.cpu(), [one.cpu() / mass.cpu() for one in moments]
    placed = mass > _MOST
    apart = _APART / max(1, int(placed.sum())) ** (1 / len(centres))
    flat = torch.zeros(int(placed.sum()), dtype=torch.long)
    grid = []
    for centre in centres:
        order = centre[placed].sort()
        level = torch.zeros_like(flat)
        level[order.indices] = (order.values.diff(prepend=order.values[:1]) > apart).long().cumsum(0)
        grid.append(int(level.max()) + 1 if len(level) else 0)
        flat = flat * grid[-1] + level
    brought = own.cpu() > _MOST
    of = torch.where(brought, -brought.long().cumsum(1), NOWHERE)
    of[placed] = flat
    ordered = of.sort(1).values
    shared = ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any()
    if shared or not 0 < prod(grid) <= _SPARSE * len(flat.unique()):
        of[placed], grid = NOWHERE, []
    return Cells(tuple(grid), of)
