"""The maths of both rollouts, on plain tensors: fuse the heads, discard, chain the layers.

Only readout^T R of the product R of all layers is needed, so the chain is a row vector times one matrix
after another, last layer first, and each matrix is used tile by tile.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import (
    HeadFusion,
    carry,
    carry_heads,
    check_layers,
    check_options,
    check_readout,
)
from vitx.functional.tiles import ALL, Tile, full


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    readout: Tensor | None = None,
) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): how attention flows to the output.

    R = prod_l rownorm(W_l + I), last layer on the left, with W_l the fused heads of A_l; the result is
    readout^T R.

    Args:
        attentions: per layer, first layer first, (B, heads, N, N) after the softmax, rows are queries.
        head_fusion: "mean", "max" or "min" over the heads.
        discard_ratio: share in [0, 1) of the smallest entries of each fused matrix that become 0; the
            entry (0, 0) stays.
        readout: (N,) or (B, N), how much the classifier reads from each token; token 0 by default.

    Returns:
        (B, N), >= 0: the share of each input token; float32, or float64 for float64 input.

    Raises:
        VitxError: An option or a shape is wrong.

    Example:
        >>> layers = [torch.eye(3).expand(1, 2, 3, 3), torch.full((1, 2, 3, 3), 1 / 3)]
        >>> attention_rollout(layers)
        tensor([[0.6667, 0.1667, 0.1667]])
    """
    check_options(head_fusion, discard_ratio)
    check_layers(attentions, "attentions")
    rollout = Rollout(check_readout(readout, attentions[0]), head_fusion, discard_ratio)
    for attention in reversed(attentions):
        rollout.read(Tile.of(full(attention.detach())))
        rollout.end_layer()
    return rollout.relevance


def gradient_rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    readout: Tensor | None = None,
) -> Tensor:
    """Gradient rollout: attention rollout of the attention that raises one target's score.

    As `attention_rollout`, with W_l = relu(fuse(A_l * G_l)), where G_l is the gradient of the target's
    score with respect to A_l (the idea of jacobgil/vit-explain).

    Args:
        attentions: as for `attention_rollout`.
        gradients: the gradient of the score with respect to each of them, in the same order and shape.
        head_fusion: as for `attention_rollout`.
        discard_ratio: as for `attention_rollout`.
        readout: as for `attention_rollout`.

    Returns:
        (B, N), >= 0; float32, or float64 for float64 input.

    Raises:
        VitxError: An option or a shape is wrong.
    """
    check_options(head_fusion, discard_ratio)
    check_layers(attentions, "attentions")
    check_layers(gradients, "gradients")
    if len(attentions) != len(gradients):
        raise VitxError(
            f"found {len(attentions)} layers of attentions and {len(gradients)} of gradients: give one "
            "gradient for each attention, in the same order"
        )
    for attention, gradient in zip(attentions, gradients, strict=True):
        if attention.shape != gradient.shape:
            raise VitxError(
                f"each gradient must have the shape of its attention, {tuple(attention.shape)}, found "
                f"{tuple(gradient.shape)}"
            )
    rollout = Rollout(check_readout(readout, attentions[0]), head_fusion, discard_ratio)
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        rollout.read(Tile.of(full(attention.detach()), full(gradient.detach())))
        rollout.end_layer()
    return rollout.relevance


class RolloutLayer:
    """Relevance through rownorm(W + I), or rownorm(W) without a residual, tile by tile.

    W = discard(fuse(A)), or discard(relu(fuse(A * G))) of tiles with gradients.

    Attributes:
        values: what the tokens that are attended to get, (B, K).
        stays: what the tokens that attend keep, (B, Q).
    """

    def __init__(
        self,
        relevance: Tensor,
        keys: int,
        head_fusion: str = "mean",
        discard_ratio: float = 0.0,
        residual: bool = True,
    ) -> None:
        """Begins with the relevance of the tokens that attend, (B, Q)."""
        self.head_fusion = head_fusion
        self.discard_ratio = discard_ratio
        self.values = relevance.new_zeros(len(relevance), keys)
        self.stays = torch.zeros_like(relevance)
        self._relevance = relevance
        self._identity = int(residual)
        self._fusion = HeadFusion(head_fusion)
        self._images = ALL  # those of the matrix that waits for its other rows
        self._matrix: Tensor | None = None

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        if not self.discard_ratio:
            relevance = self._relevance[tile.images][:, tile.rows]
            if relevance.device.type == "cpu" and not relevance.any():
                return  # as for all but one row of the last layer; a GPU would have to be waited for
            if tile.gradient is None and tile.sums_to_1 and self.head_fusion == "mean":
                self._move_heads(tile, relevance)
                return
        matrix = self._fuse(tile)
        if matrix is None:
            return
        if not self.discard_ratio:
            self._move(tile.images, tile.rows, matrix)
            return
        if self._matrix is None or self._images != tile.images:
            self._discard_and_move()
            self._images = tile.images
            self._matrix = matrix.new_zeros(len(matrix), self._relevance.shape[1], matrix.shape[2])
        self._matrix[:, tile.rows] = matrix

    def end(self) -> None:
        """All rows were read."""
        self._discard_and_move()

    def _fuse(self, tile: Tile) -> Tensor | None:
        fused = self._fusion.add(tile.weights, tile.gradient, tile.of_heads)
        if fused is None:
            return None
        return fused.abs_() if tile.gradient is None else fused.relu_()  # heads may be mixed with any sign

    def _move_heads(self, tile: Tile, relevance: Tensor) -> None:
        """Adds the part of some heads, whose mean over all has rows that sum to 1."""
        share = relevance / ((1 + self._identity) * tile.of_heads)
        self.stays[tile.images][:, tile.rows].add_(share, alpha=self._identity * tile.weights.shape[1])
        self.values[tile.images].add_(carry_heads(share, tile.weights))

    def _move(self, images: slice, rows: slice, matrix: Tensor) -> None:
        """Adds rownorm(W + I) of some rows: a part stays with the token, another goes where W says.

        Args:
            images: which, b of them.
            rows: which, n of them.
            matrix: W, (b, n, K).
        """
        share = self._relevance[images][:, rows] / (matrix.sum(-1) + self._identity)
        self.stays[images][:, rows].add_(share, alpha=self._identity)
        self.values[images].add_(carry(share, matrix))

    def _discard_and_move(self) -> None:
        if self._matrix is not None:
            self._move(self._images, ALL, discard(self._matrix, self.discard_ratio))
            self._matrix = None


class Rollout:
    """readout^T R for R = prod rownorm(W_l + I), taken through one layer after another, last layer first.

    Attributes:
        relevance: (B, N), of the tokens that enter the layers seen so far.
        start_layer: the first layer of the model that counts.
    """

    def __init__(
        self, readout: Tensor, head_fusion: str = "mean", discard_ratio: float = 0.0, start_layer: int = 0
    ) -> None:
        self.start_layer = start_layer
        self._options = head_fusion, discard_ratio
        self._begin(readout)

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        self._layer.read(tile)

    def end_layer(self) -> None:
        """Goes on to the layer below."""
        self._layer.end()
        self._begin(self._layer.values + self._layer.stays)

    def _begin(self, relevance: Tensor) -> None:
        self.relevance = relevance
        self._layer = RolloutLayer(relevance, relevance.shape[1], *self._options)


def discard(matrix: Tensor, ratio: float) -> Tensor:
    """Sets the floor(ratio * N * N) smallest entries of each matrix to 0, but never the entry (0, 0).

    Of equal entries the first ones go, so that the result does not depend on the sorting algorithm.

    Args:
        matrix: (B, N, N), >= 0.
        ratio: in [0, 1).
    """
    flat = matrix.flatten(1)
    count = int(ratio * flat.shape[1])
    if count == 0:
        return matrix
    kept = (_cut_on_cpu if matrix.device.type == "cpu" else _cut)(flat, count)
    kept[:, 0] = flat[:, 0]
    return kept.view_as(matrix)


def _cut(flat: Tensor, count: int) -> Tensor:
    """Sets the smallest entries of each row to 0, without a look at the values from the host."""
    threshold = flat.kthvalue(count, dim=1, keepdim=True).values
    below = flat < threshold
    equal = flat == threshold
    room = count - below.sum(1, keepdim=True)
    return flat.masked_fill(below | (equal & (equal.cumsum(1) <= room)), 0)


def _cut_on_cpu(flat: Tensor, count: int) -> Tensor:
    """The same. NumPy's selection is vectorised: it takes a sixth of the time of torch's."""
    kept = torch.empty_like(flat)
    for values, found in zip(flat, kept, strict=True):
        ordered = np.partition(values.numpy(), count - 1)
        threshold = float(ordered[count - 1])
        torch.threshold(values, threshold, 0, out=found)
        equal = int((ordered[count:] == threshold).sum())
        if equal and threshold:
            found[(values == threshold).nonzero()[-equal:, 0]] = threshold
    return kept
