"""Fused attention as the model runs it, and what else can be had for the same work.

The kernel of the forward pass knows the log-sum-exp of each row of scores; with it, A is one exponential
away. And the backward pass of attention computes A and its gradient tile by tile: here it hands them out.
Where A is small, a kernel that does not write it down is no faster than one that does: what is needed of it
is kept.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn import functional as F

from vitx.attention.fusing import fuse_into
from vitx.attention.layer import Attention, DotProductAttention, StoredAttention
from vitx.attention.tiles import Memory, Tile, full, heads_first, products, without_copies
from vitx.models.isolation import without_autocast

Reader = Callable[[Iterator[Tile]], Iterator[Tile]]
_SMALL = 2**21  # entries of the A of an image; the fused heads of larger ones would take too much memory


def attend(*operands: Any, **options: Any) -> tuple[Tensor, Attention]:
    """Runs `scaled_dot_product_attention` as `run` does; its output is a part of the graph."""
    output, attention = run(*operands, **options)
    if isinstance(attention, SharedAttention):
        query, key, value = operands[:3]
        output = attention.attend(query, key, value, output)
    return output, attention


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    gradients: bool,
    fixed: bool = False,
    head_fusion: str | None = None,
    memory: Memory | None = None,
) -> tuple[Tensor, Attention]:
    """Runs `scaled_dot_product_attention`.

    Args:
        query: (B, H, Q, d).
        key: (B, H, K, d).
        value: (B, H, K, d).
        attn_mask: what is added to the scores, or True where attention is allowed.
        dropout_p: as there.
        is_causal: as there.
        scale: as there.
        enable_gqa: as there.
        gradients: keep what the gradient of A needs.
        fixed: let no gradient through A, but through the values alone.
        head_fusion: how to fuse the heads of an A that is small, so as to keep them; None: nothing is kept,
            A is computed anew.
        memory: what other calls share with this one.

    Returns:
        Its output, the same to the last bit (up to rounding if A was kept), and what describes A. The output
        is a part of the graph unless that is a `SharedAttention`, whose `attend` makes it one.
    """
    call = partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    mask = None if attn_mask is None else attn_mask.detach()
    if fixed:
        query, key, attn_mask = query.detach(), key.detach(), mask
    learned_mask = attn_mask is not None and attn_mask.requires_grad
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    special = dropout_p or enable_gqa or learned_mask or (learning and not gradients)
    output = log_sum_exp = None
    if not special and _is_plain(query, key, value):
        masked = is_causal or mask is not None
        if head_fusion and not (gradients or masked) and _is_small(query, key, value):
            return _with_fused_heads(query, key, value, scale, head_fusion, memory or Memory())
        output, log_sum_exp = _with_log_sum_exp(partial(call, attn_mask=mask), query, key, value)
    if output is None or (gradients and log_sum_exp is None):
        output = call(query, key, value, attn_mask=attn_mask)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    shared = gradients and log_sum_exp is not None
    attention = (SharedAttention if shared else DotProductAttention)(
        query.detach(),
        key.detach(),
        value.detach(),
        gradients=gradients,
        mask=mask,
        scale=scale,
        log_sum_exp=log_sum_exp,
        memory=memory,
    )
    return output, attention


class SharedAttention(DotProductAttention):
    """Dot-product attention with a backward pass of its own, whose tiles can be read as they are made.

    Attributes:
        reader: what the tiles pass on their way; None: nobody reads.
    """

    reader: Reader | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """Returns the output as a function of query, key and value that autograd knows."""
        attended: Tensor = _Attend.apply(query, key, value, self, lambda: output)
        return attended

    def backward(
        self, query: Tensor, key: Tensor, output: Tensor, gradient: Tensor, fixed: bool
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of query, key and value: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.

        Args:
            query: (B, H, Q, d).
            key: (B, H, K, d).
            output: (B, H, Q, d).
            gradient: of the output, of the same shape.
            fixed: whether query and key need none.
        """
        query, key, gradient = full(query), full(key), full(gradient)
        into_query, into_key, into_value = (heads_first(t.shape, t) for t in (query, key, key))
        along = (gradient * output).sum(-1, keepdim=True)  # of each row, the sum of A * dA
        used = _used_rows(gradient)

        tiles = self.tiles(gradient, used)
        for tile in tiles if self.reader is None else self.reader(tiles):
            heads, rows = (tile.images, tile.heads), (tile.images, tile.heads, tile.rows)
            if not used.start <= tile.rows.start < used.stop:
                into_query[rows] = 0
                continue
            more = tile.rows.start > used.start
            products(tile.weights.mT, gradient[rows], out=into_value[heads], add=more)
            if fixed:
                continue
            assert tile.gradient is not None
            scores = tile.gradient.sub_(along[rows]).mul_(tile.weights)
            products(scores.mT, query[rows], out=into_key[heads], scale=self._scale, add=more)
            products(scores, key[heads], out=into_query[rows], scale=self._scale)
        return (None, None, into_value) if fixed else (into_query, into_key, into_value)


def _used_rows(gradient: Tensor) -> slice:
    """Finds the rows outside which a gradient, (B, H, Q, d), is 0: at least one.

    A classifier that reads the class token leaves the last layer's other rows without a gradient.
    """
    if gradient[:, :, 0].any() and gradient[:, :, -1].any():  # as in any other layer
        return slice(0, gradient.shape[2])
    used = gradient.any(-1).flatten(0, 1).any(0).nonzero()[:, 0].tolist() or [0]
    return slice(used[0], used[-1] + 1)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention: SharedAttention,
        output: Callable[[], Tensor],
    ) -> Tensor:
        attended = output()
        ctx.attention = attention
        ctx.save_for_backward(query, key, value, attended)  # so that a change in place is noticed
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output = ctx.saved_tensors
        with without_autocast(gradient.device):
            found = ctx.attention.backward(query, key, output, gradient, not any(ctx.needs_input_grad[:2]))
        pairs = zip(found, (query, key, value), strict=True)
        return *(None if g is None else g.to(t.dtype) for g, t in pairs), None, None


def _with_fused_heads(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, head_fusion: str, memory: Memory
) -> tuple[Tensor, StoredAttention]:
    """Runs attention by way of A; returns its output, laid out as the kernel does, and the fused heads.

    Heads are fused one after another, so that what is found of an image does not depend on those beside it.
    """
    batch, heads, queries, dim = query.shape
    keys = key.shape[-2]
    scale = dim**-0.5 if scale is None else scale
    output = value.new_empty(batch, queries, heads, value.shape[-1]).transpose(1, 2)
    fused = value.new_empty(batch, queries, keys)
    for part in without_copies(batch, heads, queries * keys, query.device):
        q, k, v = query[part], key[part], value[part]
        scores = memory.take("weights", (len(q), queries, keys), q).baddbmm_(q, k.mT, beta=0, alpha=scale)
        weights = torch.softmax(scores, -1, out=scores)
        output[part] = weights @ v
        images, some = part
        for head, matrix in enumerate(weights) if isinstance(images, int) else [(some, weights)]:
            fuse_into(fused[images], matrix, head_fusion, heads, first=head == 0)
    return output, StoredAttention(fused[:, None], value, gradients=False, sums_to_1=head_fusion == "mean")


def _with_log_sum_exp(
    call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Runs attention on detached tensors; returns its output and the log-sum-exp of each row, (B, H, Q).

    Only the node that a kernel leaves in the graph tells it: one is made, read, and dropped. It is None
    where the chosen kernel has none.
    """
    with torch.enable_grad():
        output = call(query.detach().requires_grad_(), key.detach(), value.detach())
    log_sum_exp = getattr(output.grad_fn, "_saved_logsumexp", None)
    return output.detach(), None if log_sum_exp is None else log_sum_exp.detach()


def _is_plain(*tensors: Tensor) -> bool:
    """Whether nothing stands between these tensors and the kernels of the CPU.

    Autocast would round them; what hooks saved tensors, as activation checkpointing does, must see the very
    calls of the model.
    """
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if any(type(t) is not Tensor or t.device.type != "cpu" or t.is_inference() for t in tensors):
        return False
    try:
        with disable_saved_tensors_hooks(""):
            return True
    except RuntimeError:
        return False


def _is_small(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the A of an image is small; half precision would round it otherwise than the kernel."""
    if query.ndim != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return False
    entries = query.shape[1] * query.shape[2] * key.shape[2]
    return query.dtype in (torch.float32, torch.float64) and entries <= _SMALL
