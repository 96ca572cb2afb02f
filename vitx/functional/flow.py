"""Attention flow on plain tensors: the maximum flow to each token, with attention as capacities."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import check_layers, check_options, check_readout, fused
from vitx.functional.weights import Weights

_UNITS = 2**30  # for the whole read-out: scipy's capacities are int32, and rounding may add a few
_KEPT = (16, 64)  # average numbers of edges per row to try before using all edges


def attention_flow(
    attentions: Sequence[Tensor], *, head_fusion: str = "mean", readout: Tensor | None = None
) -> Tensor:
    """Compute attention flow (Abnar & Zuidema 2020, arXiv 2005.00928): the maximum flow to each token.

    An edge leads from token i above layer l to token j below it; its capacity is entry (i, j) of
    rownorm(W_l + I), where W_l is A_l with its heads fused. A source supplies token i above the last layer
    with at most readout_i. The relevance of a token below the first layer is the maximum flow to that token
    alone, so the values of the tokens do not sum to 1. In deep models, almost every flow is limited by the
    read-out or by the token's column of the first layer, so the map shows that layer alone.

    Each token is a separate maximum flow problem, which takes seconds per image. Capacities are rounded to
    multiples of 2^-30 of the read-out; the flow is then exact (Dinic's algorithm).

    Args:
        attentions: one (B, heads, N, N) per layer, first layer first, after the softmax; rows are queries.
        head_fusion: "mean" (as in the paper), "max" or "min" over the heads.
        readout: (N,) or (B, N), >= 0, how much the classifier reads from each token; token 0 by default.

    Returns:
        (B, N), from 0 to the sum of the read-out; NaN for images whose attention is not finite. float32, or
        float64 for float64 input.

    Raises:
        VitxError: An option or a shape is invalid, or an entry is negative.

    Example:
        >>> layers = [torch.eye(3).expand(1, 2, 3, 3), torch.full((1, 2, 3, 3), 1 / 3)]
        >>> attention_flow(layers)
        tensor([[0.6667, 0.1667, 0.1667]])
    """
    check_options(head_fusion)
    check_layers(attentions, "attentions")
    readout = check_readout(readout, attentions[0])
    return flows([capacities(Weights.of(layer), head_fusion) for layer in attentions], readout)


def capacities(weights: Weights, head_fusion: str) -> Tensor:
    """Return rownorm(W + I) of a layer, (B, N, N), on the CPU."""
    images, _, *size = weights.shape
    matrix = torch.empty(images, *size, dtype=weights.dtype, device="cpu")
    for some, rows, part in fused(weights.tiles(), head_fusion):
        matrix[some, rows] = part
    _check_not_negative("the attention", matrix)
    matrix.diagonal(dim1=1, dim2=2).add_(1)
    return matrix.div_(matrix.sum(-1, keepdim=True))


def flows(layers: Sequence[Tensor], readout: Tensor) -> Tensor:
    """Return the maximum flow to each token below the first layer, (B, N), given the layers' capacities."""
    from tqdm import tqdm

    _check_not_negative("the read-out", readout)
    found = chain.from_iterable(
        largest_flows([layer[image].double().numpy() for layer in layers], given, range(len(given)))
        for image, given in enumerate(readout.double().cpu().numpy())
    )
    shown = tqdm(found, total=readout.numel(), desc="attention flow", unit="token", disable=None, leave=False)
    return torch.tensor(list(shown), dtype=torch.float64, device="cpu").view_as(readout).to(readout)


def largest_flows(
    layers: Sequence[NDArray[np.float64]], readout: NDArray[np.float64], sinks: Sequence[int]
) -> Iterator[float]:
    """Yield the maximum flow from the read-out, (N,), to each sink alone, through layers of shape (N, N).

    The largest edges are tried first: if the flow through them reaches its upper bound, it is the maximum.
    """
    from scipy.sparse.csgraph import maximum_flow

    if not all(np.isfinite(part).all() for part in (*layers, readout)):
        yield from (np.nan for _ in sinks)
        return
    # A row sums to 1, so a token passes on at most 1. No edge carries more than the source gives in total,
    # which must fit into an int32.
    given = np.minimum(readout, 1)
    total = given.sum()
    unit = (total or 1) / _UNITS
    parts = (np.minimum(part, total) for part in (given, *layers))
    supply, *units = (np.rint(part / unit).astype(np.int32) for part in parts)
    tokens, source = len(supply), len(supply) * len(layers)
    passed = np.minimum(supply, units[-1].sum(1, dtype=np.int64)).sum(dtype=np.int64)
    bounds = np.minimum(passed, units[0].sum(0, dtype=np.int64))
    graph_of = cache(partial(_graph, units[1:], supply))
    for sink in sinks:
        for kept in (*(count for count in _KEPT if count < tokens), tokens):
            graph = graph_of(kept)
            graph.data[:tokens] = units[0][:, sink]
            flow = maximum_flow(graph, source, source + 1).flow_value
            if flow == bounds[sink]:
                break
        yield float(flow * unit)


def _graph(layers: Sequence[NDArray[np.int32]], supply: NDArray[np.int32], kept: int) -> Any:
    """Build the graph between source and sink, with the `kept` largest edges of each row, on average.

    The nodes are the tokens above the first layer, those above each later layer, the source and the sink. The
    first N edges lead through the first layer into the sink; the caller sets their capacities.
    """
    from scipy.sparse import bmat, csr_array

    tokens, nodes = len(supply), len(layers) + 3
    blocks: list[list[Any]] = [[None] * nodes for _ in range(nodes)]
    blocks[0][-1] = csr_array(np.ones((tokens, 1), np.int32))
    for number, layer in enumerate(layers, 1):
        rows = supply > 0 if number == len(layers) else supply >= 0  # the others get nothing from the source
        count = min(kept * tokens // max(rows.sum(), 1), tokens)
        least = np.partition(layer, -count, axis=1)[:, -count, None]
        blocks[number][number - 1] = csr_array(layer * (rows[:, None] & (layer >= least)))
    blocks[-2][-3], blocks[-1][-2] = csr_array(supply[None]), csr_array((1, 1), dtype=np.int32)
    return csr_array(bmat(blocks))


def _check_not_negative(name: str, capacities: Tensor) -> None:
    negative = capacities[capacities < 0]
    if len(negative):
        bounds = f"must be at least 0 to be a capacity of attention flow, found {negative.min():.3g}"
        raise VitxError(f"{name} {bounds}: give it as it is after the softmax")
