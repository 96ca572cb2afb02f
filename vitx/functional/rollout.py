"""Attention rollout and gradient rollout on plain tensors: fused heads, discarded entries, chained layers.

Only readout^T R is needed, where R is the product of all layers. So a row vector is multiplied by one matrix
after another, last layer first, and each matrix is used tile by tile.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitx.errors import VitxError
from vitx.functional.fusing import carry, check_layers, check_options, check_readout, fused
from vitx.functional.tiles import ALL, is_zero
from vitx.functional.weights import Weights


def attention_rollout(
    attentions: Sequence[Tensor],
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
    readout: Tensor | None = None,
) -> Tensor:
    """Compute attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928): how attention reaches the output.

    The result is readout^T R for R = prod_l rownorm(W_l + I), last layer on the left, and W_l the fused A_l.

    Args:
        attentions: one (B, heads, N, N) per layer, first layer first, after the softmax; rows are queries.
        head_fusion: "mean", "max" or "min" over the heads.
        discard_ratio: share in [0, 1) of the smallest entries of each fused matrix to set to 0; entry
            (0, 0) is kept.
        readout: (N,) or (B, N), how much the classifier reads from each token; token 0 by default.

    Returns:
        (B, N), >= 0: the share of each input token; float32, or float64 for float64 input.

    Raises:
        VitxError: An option or a shape is invalid.

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
    """Compute gradient rollout: attention rollout of only the attention that raises a target's score.

    This is `attention_rollout` with W_l = relu(fuse(A_l * G_l)), where G_l is the gradient of the target's
    score with respect to A_l (an idea of jacobgil/vit-explain).

    Args:
        attentions: as for `attention_rollout`, like all arguments below.
        gradients: the gradient of the score with respect to each attention, in the same order and shape.
        head_fusion: "mean", "max" or "min".
        discard_ratio: in [0, 1).
        readout: (N,) or (B, N).

    Returns:
        (B, N), >= 0; float32, or float64 for float64 input.

    Raises:
        VitxError: An option or a shape is invalid.
    """
    return _rollout(attentions, list(gradients), head_fusion, discard_ratio, readout)


def _rollout(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    head_fusion: str,
    discard_ratio: float,
    readout: Tensor | None,
) -> Tensor:
    """Carry the read-out through the layers, last layer first."""
    check_options(head_fusion, discard_ratio)
    check_layers(attentions, "attentions")
    if gradients is not None:
        check_layers(gradients, "gradients")
        wanted, found = ([tuple(one.shape) for one in layers] for layers in (attentions, gradients))
        if wanted != found:
            raise VitxError(
                f"found {len(wanted)} layers of attentions and {len(found)} of gradients, of shapes {wanted} "
                f"and {found}: give one gradient of the same shape for each attention, in the same order"
            )
    relevance = check_readout(readout, attentions[0])
    for number in reversed(range(len(attentions))):
        weights = Weights.of(attentions[number], None if gradients is None else gradients[number])
        values, stays = through_layer(relevance, weights, head_fusion, discard_ratio)
        relevance = values + stays
    return relevance


def through_layer(
    relevance: Tensor,
    weights: Weights,
    head_fusion: str,
    discard_ratio: float = 0.0,
    *,
    residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Carry the relevance of queries, (B, Q), through rownorm(W + I), or rownorm(W) without a residual.

    W = discard(fuse(A)), or discard(relu(fuse(A * G))) if the gradient is known.

    Returns:
        The relevance that the keys receive, (B, K), and the relevance that the queries keep, (B, Q).
    """
    identity, tiles = int(residual), weights.tiles()
    if not discard_ratio:
        tiles = (tile for tile in tiles if not is_zero(relevance[tile.images][:, tile.rows]))
    values, stays = relevance.new_zeros(len(relevance), weights.shape[3]), torch.zeros_like(relevance)
    whole: Tensor | None = None  # the matrix of some images, until all of its rows are known
    for images, rows, matrix in fused(tiles, head_fusion):
        # Entries may be negative if the model mixes its heads.
        matrix = matrix.abs_() if weights.compute_gradient is None else matrix.relu_()
        if discard_ratio:
            whole = matrix.new_empty(len(matrix), *weights.shape[2:]) if whole is None else whole
            whole[:, rows] = matrix
            if rows.stop < weights.shape[2]:
                continue
            rows, matrix, whole = ALL, discard(whole, discard_ratio), None
        share = relevance[images][:, rows] / (matrix.sum(-1) + identity)
        stays[images][:, rows] = share * identity
        values[images] += carry(share, matrix[:, None])
    return values, stays


def discard(matrix: Tensor, ratio: float) -> Tensor:
    """Set the floor(ratio * N * N) smallest entries of each matrix, (B, N, N), to 0, but never entry (0, 0).

    Of equal entries, the first ones are set to 0, so the result does not depend on the sorting algorithm.
    """
    flat = matrix.flatten(1)
    count, on_cpu = int(ratio * flat.shape[1]), matrix.device.type == "cpu"
    if count == 0:
        return matrix
    if on_cpu:  # NumPy's selection is vectorized
        threshold = torch.from_numpy(np.partition(flat.numpy(), count - 1)[:, count - 1, None])
    else:
        threshold = flat.kthvalue(count, dim=1, keepdim=True).values
    kept = flat > threshold
    if not on_cpu or kept.sum() < kept.numel() - count * len(flat):  # counting would synchronize a GPU
        equal = flat == threshold
        kept |= equal & (equal.cumsum(1) > count - (flat < threshold).sum(1, keepdim=True))
    kept[:, 0] = True
    return (flat * kept).view_as(matrix)
