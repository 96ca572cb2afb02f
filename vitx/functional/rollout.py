"""The maths of both rollouts, on plain tensors: fuse the heads, discard, chain the layers.

Only readout^T R of the product R of all layers is needed, so the chain is a row vector times one matrix
after another, last layer first, and each matrix is used tile by tile.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import HeadFusion, carry_heads, check_layers, check_options, check_readout
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
    return _rollout(attentions, None, head_fusion, discard_ratio, readout)


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
    return _rollout(attentions, list(gradients), head_fusion, discard_ratio, readout)


def _rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    head_fusion: str,
    discard_ratio: float,
    readout: Tensor | None,
) -> Tensor:
    """Takes the read-out through one layer after another, last layer first."""
    check_options(head_fusion, discard_ratio)
    check_layers(attentions, "attentions")
    if gradients is not None:
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
    relevance = check_readout(readout, attentions[0])
    for number in reversed(range(len(attentions))):
        outer = None if gradients is None else full(gradients[number].detach())
        layer = RolloutLayer(relevance, relevance.shape[1], head_fusion, discard_ratio)
        layer.read(Tile.of(full(attentions[number].detach()), outer))
        relevance = layer.values + layer.stays
    return relevance


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
        head_fusion: str,
        discard_ratio: float = 0.0,
        residual: bool = True,
    ) -> None:
        """Begins with the relevance of the tokens that attend, (B, Q)."""
        self.values = relevance.new_zeros(len(relevance), keys)
        self.stays = torch.zeros_like(relevance)
        self._relevance, self._identity = relevance, int(residual)
        self._head_fusion, self._discard_ratio = head_fusion, discard_ratio
        self._fusion = HeadFusion(head_fusion)
        self._matrix: Tensor | None = None  # W of some images, which waits for its other rows

    def read(self, tile: Tile) -> None:
        """Takes in some rows of the layer."""
        if not self._discard_ratio:
            relevance = self._relevance[tile.images][:, tile.rows]
            if relevance.device.type == "cpu" and not relevance.any():
                return  # as for all but one row of the last layer; a GPU would have to be waited for
            if tile.gradient is None and tile.sums_to_1 and self._head_fusion == "mean":
                self._move(tile.images, tile.rows, tile.weights, tile.of_heads * (1 + self._identity))
                return
        matrix = self._fusion.add(tile.weights, tile.gradient, tile.of_heads)
        if matrix is None:
            return
        # Heads may have been mixed with any sign.
        matrix = matrix.abs_() if tile.gradient is None else matrix.relu_()
        rows = tile.rows
        if self._discard_ratio:
            if self._matrix is None:
                self._matrix = matrix.new_zeros(len(matrix), self._relevance.shape[1], matrix.shape[2])
            self._matrix[:, rows] = matrix
            if rows.stop not in (None, self._matrix.shape[1]):
                return  # the last rows come last
            rows, matrix, self._matrix = ALL, discard(self._matrix, self._discard_ratio), None
        self._move(tile.images, rows, matrix[:, None], matrix.sum(-1) + self._identity)

    def _move(self, images: slice, rows: slice, heads: Tensor, whole: Tensor | int) -> None:
        """Adds what stays with the token and what goes to others, by W or heads of it, (b, g, n, K).

        `whole` is what a row of W + I sums to, times the number of heads.
        """
        share = self._relevance[images][:, rows] / whole
        self.stays[images][:, rows].add_(share, alpha=self._identity * heads.shape[1])
        self.values[images].add_(carry_heads(share, heads))


def discard(matrix: Tensor, ratio: float) -> Tensor:
    """Sets the floor(ratio * N * N) smallest entries of each matrix, (B, N, N), to 0, but never entry (0, 0).

    Of equal entries the first ones go, so that the result does not depend on the sorting algorithm.
    """
    flat = matrix.flatten(1)
    count = int(ratio * flat.shape[1])
    if count == 0:
        return matrix
    on_cpu = matrix.device.type == "cpu"
    if on_cpu:  # NumPy's selection is vectorised
        threshold = torch.from_numpy(np.partition(flat.numpy(), count - 1)[:, count - 1, None])
    else:
        threshold = flat.kthvalue(count, dim=1, keepdim=True).values
    kept = flat > threshold
    if not on_cpu or kept.sum() < kept.numel() - count * len(flat):  # a GPU would have to be waited for
        equal = flat == threshold
        room = count - (flat < threshold).sum(1, keepdim=True)
        kept |= equal & (equal.cumsum(1) > room)
    kept[:, 0] = True
    return (flat * kept).view_as(matrix)
