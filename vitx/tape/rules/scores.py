"""Products of two live values that are summed, and are no attention: what weights are made of.

Some are read as they are: the masks of mask queries are scores of queries and pixels, and a semantic
segmentation is the mean of their masks, weighted by their classes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vitx.tape import axes as ax
from vitx.tape.attention import Mixture, Scores
from vitx.tape.call import Call
from vitx.tape.contraction import Contraction, transposed
from vitx.tape.expanded import over, reshaped, scaled, spread
from vitx.tape.values import Back, Value


def scores(call: Call, contraction: Contraction, values: Sequence[Value], factor: float) -> Value:
    """Follows q k^T, which is to become weights; what reads it as it is gives half to each."""
    operands, dims, out = contraction[:2], contraction.summed, contraction.out
    shapes, sizes = [o.shape for o in operands], [o.tensor.shape for o in operands]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        half = scaled(reshaped(arrived[0], out), 0.5)
        pairs = zip(shapes, sizes, strict=True)
        return [reshaped(spread(half, shape, dims), size) for shape, size in pairs]

    def contracts_channels() -> bool:
        axes = [ax.reshaped(value.axes, shape) for value, shape in zip(values, shapes, strict=True)]
        return all({*dims} <= {*ax.channel_dims(one or ())} for one in axes)

    kind = partial(Scores, contracts_channels=contracts_channels)
    found = call.make(values, relevance, _of_both(call, contraction, factor), kind=kind)
    found.kind = "scores"
    return found


def mixed(call: Call, contraction: Contraction, factor: float) -> Value:
    """Follows weights times weights: weights, or a mean of what several queries say, if that is read.

    Then each factor has half, in proportion to the size of what they make together.
    """
    operands, out = contraction[:2], contraction.out
    values = [operand.value for operand in operands if operand.value is not None]
    shapes, sizes = [o.shape for o in operands], [o.tensor.shape for o in operands]
    kept = [call.tape.keeper.keep(o.tensor) for o in operands]

    def relevance(arrived: list[Tensor]) -> list[Tensor]:
        r, dims = arrived[0], list(range(len(out)))
        each = [one.tensor.abs().reshape(shape).to(r) for one, shape in zip(kept, shapes, strict=True)]
        whole = torch.einsum(each[0], dims, each[1], dims, [d for d in dims if d not in contraction.summed])
        share = over(r.reshape(out) / 2, whole.reshape(out))
        parts = zip(each, each[::-1], shapes, sizes, strict=True)
        return [transposed(share, other, shape, n) * own.reshape(n) for own, other, shape, n in parts]

    own = [ax.channel_dims(ax.reshaped(v.over or (), s) or ()) for v, s in zip(values, shapes, strict=True)]
    if any({*dims} & {*contraction.summed} for dims in own):  # one of them may be attention to the other
        found = call.make(call.values, None)
    else:
        found = call.make(values, relevance, _of_both(call, contraction, factor), kind=Mixture)
    found.kind = "weights"
    return found


def _of_both(call: Call, contraction: Contraction, factor: float) -> Back:
    """Returns the gradient of a product of two live values: half of it to each, the other one held."""
    operands, out = contraction[:2], contraction.out
    shapes, sizes = [o.shape for o in operands], [o.tensor.shape for o in operands]
    kept = [call.tape.keeper.keep(o.tensor) for o in operands] if call.linearised else []

    def gradient(arrived: list[Tensor]) -> list[Tensor]:
        g = arrived[0].reshape(out) * (factor / 2)
        others = [one.tensor.reshape(shape) for one, shape in zip(kept, shapes, strict=True)][::-1]
        return [transposed(g, *each) for each in zip(others, shapes, sizes, strict=True)]

    return gradient
