"""Attention sinks, to which most queries of most layers attend (Darcet et al. 2024, arXiv 2309.16588)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitx.functional.tiles import ALL, split
from vitx.functional.weights import Weights

TIMES = 5  # a query attends to a token if its weight exceeds the query's median weight by this factor
EVEN = 1.5  # and the even share 1 / N by this factor: the median of a peaked softmax is near 0
MOST = 0.75  # share of the queries that must attend to a sink
_ROWS = 16  # queries to sample: the choice matters little, as most of them must agree


def sinks(layers: Sequence[Sequence[Weights]]) -> Tensor:
    """Find the tokens that over three quarters of the queries attend to, in more than half of the layers.

    A query attends to a token if its weight, averaged over the heads, is more than 5 times its median weight
    and more than 1.5 / N. Evenly spaced queries stand for all. With these thresholds, one of 400 photographs
    has a sink in DeiT-Tiny, and all sinks planted in random models are found.

    Args:
        layers: the attentions of each layer, (B, heads, N, N), whose heads are averaged together.

    Returns:
        (B, N) bool.

    Example:
        >>> a = torch.full((1, 2, 8, 8), 0.05)
        >>> a[..., 3] = 0.65
        >>> sinks([[Weights.of(a)]] * 3).nonzero().tolist()
        [[0, 3]]
    """
    count = torch.zeros((), dtype=torch.long, device="cpu")
    for left, layer in zip(reversed(range(len(layers))), layers, strict=True):
        count = count + _attended(layer)
        if count.device.type == "cpu" and 2 * (int(count.max()) + left) <= len(layers):
            break  # no token can reach a majority any more
    return count * 2 > len(layers)


def _attended(layer: Sequence[Weights]) -> Tensor:
    """Return a mask of the tokens that most queries of a layer attend to, (B, N)."""
    images, _, count, tokens = layer[0].shape
    step = -(-count // _ROWS)
    start = (count - 1) % step // 2  # centers the sampled queries
    asked = len(range(start, count, step))
    heads = sum(one.shape[1] for one in layer)
    found = torch.empty(images, tokens, dtype=torch.bool, device=layer[0].device)
    for some, _, _ in split((images, 1, asked, tokens * max(one.shape[1] for one in layer)), found.device):
        rows = torch.zeros((), device=found.device)
        for one in layer:
            rows = rows + one.compute((some, ALL, slice(start, None, step))).sum(1) / heads
        least: Tensor | float = EVEN / tokens
        if found.device.type != "cpu" or ((rows > least).sum(1) > MOST * asked).any():
            least = (TIMES * rows.median(-1, keepdim=True).values).clamp(min=EVEN / tokens)
        found[some] = (rows > least).sum(1) > MOST * asked
    return found
