"""The maths of both rollouts, on plain tensors: fuse the heads, discard, chain the layers.

Only readout^T R of the product R of all layers is needed, so the chain is a row vector times one matrix
after another, last layer first: no N x N product is formed and one layer is alive at a time.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vitx.errors import VitxError

HEAD_FUSIONS = ("mean", "max", "min")


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
    _check_layers(attentions, "attentions")
    matrices = (
        layer_matrix(attention, head_fusion=head_fusion, discard_ratio=discard_ratio)
        for attention in reversed(attentions)
    )
    return chain(matrices, _check_readout(readout, attentions[0]))


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
    _check_layers(attentions, "attentions")
    _check_layers(gradients, "gradients")
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
    pairs = zip(reversed(attentions), reversed(gradients), strict=True)
    matrices = (
        layer_matrix(attention, gradient, head_fusion=head_fusion, discard_ratio=discard_ratio)
        for attention, gradient in pairs
    )
    return chain(matrices, _check_readout(readout, attentions[0]))


def layer_matrix(
    attention: Tensor,
    gradient: Tensor | None = None,
    *,
    head_fusion: str = "mean",
    discard_ratio: float = 0.0,
) -> Tensor:
    """Returns W of one layer, (B, N, N): discard(fuse(A)), or discard(relu(fuse(A * G)))."""
    if gradient is None:
        return _discard(fuse_heads(attention, head_fusion), discard_ratio)
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    return _discard(fuse_heads(attention * gradient, head_fusion).relu_(), discard_ratio)


def chain(matrices: Iterable[Tensor], readout: Tensor) -> Tensor:
    """Returns readout^T R, (B, N), for R = prod rownorm(W + I).

    Args:
        matrices: W of each layer, (B, N, N), last layer first.
        readout: (B, N).
    """
    row = readout
    for matrix in matrices:
        row = row / (matrix.sum(-1) + 1)
        row = torch.einsum("bi,bij->bj", row, matrix) + row
    return row


def fuse_heads(heads: Tensor, head_fusion: str) -> Tensor:
    """Reduces the heads, dimension 1, in at least float32."""
    heads = heads.detach().to(torch.promote_types(heads.dtype, torch.float32))
    if head_fusion == "mean":
        return heads.mean(1)
    return heads.amax(1) if head_fusion == "max" else heads.amin(1)


def check_options(head_fusion: str, discard_ratio: float) -> None:
    """Raises a VitxError unless both options of the rollouts are in range."""
    if head_fusion not in HEAD_FUSIONS:
        raise VitxError(f"head_fusion must be one of {', '.join(HEAD_FUSIONS)}, found {head_fusion!r}")
    number = isinstance(discard_ratio, (int, float)) and not isinstance(discard_ratio, bool)
    if not number or not 0 <= discard_ratio < 1:
        raise VitxError(f"discard_ratio must be at least 0 and below 1, found {discard_ratio!r}")


def _discard(matrix: Tensor, ratio: float) -> Tensor:
    """Sets the floor(ratio * N * N) smallest entries of each matrix to 0, but never the entry (0, 0).

    Of equal entries the first ones go, so that the result does not depend on the sorting algorithm.
    """
    flat = matrix.flatten(1)
    count = int(ratio * flat.shape[1])
    if count == 0:
        return matrix
    threshold = flat.kthvalue(count, dim=1, keepdim=True).values
    below = flat < threshold
    equal = flat == threshold
    room = count - below.sum(1, keepdim=True)
    dropped = below | (equal & (equal.cumsum(1) <= room))
    dropped[:, 0] = False
    return flat.masked_fill(dropped, 0).view_as(matrix)


def _check_layers(layers: Sequence[Tensor], name: str) -> None:
    if len(layers) == 0:
        raise VitxError(f"{name} is empty: give one (B, heads, N, N) tensor per layer")
    shape: tuple[int, ...] | None = None
    for layer in layers:
        found = tuple(getattr(layer, "shape", ()))
        if len(found) != 4 or found[2] != found[3]:
            raise VitxError(f"{name} must be (B, heads, N, N) tensors, found shape {found}")
        if shape is not None and (found[0], found[2]) != (shape[0], shape[2]):
            raise VitxError(f"{name} differ in batch or token count: found {shape} and {found}")
        shape = found


def _check_readout(readout: Tensor | None, layer: Tensor) -> Tensor:
    """Returns the read-out as (B, N) in the precision of the maps; token 0 where there is none."""
    batch, tokens = layer.shape[0], layer.shape[2]
    dtype = torch.promote_types(layer.dtype, torch.float32)
    if readout is None:
        readout = torch.zeros(tokens)
        readout[0] = 1
    if tuple(readout.shape) not in ((tokens,), (batch, tokens)):
        raise VitxError(
            f"readout must have shape ({tokens},) or ({batch}, {tokens}), found {tuple(readout.shape)}"
        )
    return readout.detach().to(layer.device, dtype).expand(batch, tokens)
