"""What `F.multi_head_attention_forward`, which `nn.MultiheadAttention` calls, is given for its attention."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitx.errors import VitxError

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class MultiHead:
    """The heads and the mask of one call.

    Attributes:
        option: what was given for each parameter, by its name.
        heads: queries, keys and values, each (B, H, N, d).
        mask: what is added to the scores, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Projects the heads.

        Raises:
            VitxError: The call has keys or values besides those of the tokens, or no batch.
        """
        bound = _SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        self.option = option = bound.arguments
        more = (option[name] for name in ("bias_k", "bias_v", "static_k", "static_v"))
        if option["add_zero_attn"] or option["query"].ndim != 3 or any(one is not None for one in more):
            raise VitxError(
                "multi-head attention with add_bias_kv, add_zero_attn or unbatched input is not supported"
            )
        tokens = [option[name] for name in ("query", "key", "value")]
        triples = zip(tokens, self._weights(), self._biases(), strict=True)
        q, k, v = (self.to_heads(F.linear(x, w, b)) for x, w, b in triples)
        self.heads = q, k, v
        self.mask = _additive(option["attn_mask"], option["key_padding_mask"], self.heads[0])

    def to_heads(self, tokens: Tensor) -> Tensor:
        """From (N, B, H * d) to (B, H, N, d)."""
        heads: int = self.option["num_heads"]
        split: Tensor = tokens.unflatten(-1, (heads, -1))
        return split.permute(1, 2, 0, 3)

    def _weights(self) -> Any:
        option = self.option
        if option["in_proj_weight"] is not None and not option["use_separate_proj_weight"]:
            return option["in_proj_weight"].chunk(3)
        return [option[f"{name}_proj_weight"] for name in "qkv"]

    def _biases(self) -> Any:
        bias = self.option["in_proj_bias"]
        return [None] * 3 if bias is None else bias.chunk(3)


def _additive(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Joins the two masks (True: not attended to) to one that is added."""
    total = None
    if mask is not None:
        total = mask.view(*query.shape[:2], *mask.shape[1:]) if mask.ndim == 3 else mask
        total = _in_numbers(total.detach(), query)
    if padding is not None:
        added = _in_numbers(padding.detach()[:, None, None], query)
        total = added if total is None else total + added
    return total


def _in_numbers(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -torch.inf)
