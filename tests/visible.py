"""Networks in which every attention is a softmax that can be seen, with the other steps linear if asked."""

import copy
import math
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Linearized(TorchFunctionMode):
    """A mode that detaches the scales of norms and the gates of activations, and halves products."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self.layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return self.rms_norm(*args, **kwargs)
        if func is F.group_norm:
            return self.group_norm(*args, **kwargs)
        if func in (F.gelu, F.silu, torch.tanh):
            x = args[0]
            gate = func(*args, **kwargs).detach() / x.detach()
            return x * torch.where(x == 0, 0.5, gate)
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__) and all(map(inner, args[:2])):
            first, second = args[:2]
            return (first * second.detach() + first.detach() * second) / 2
        return func(*args, **kwargs)

    def layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5):
        dims = tuple(range(-len(shape), 0))
        centered = x - x.mean(dims, keepdim=True)
        y = centered / (centered.pow(2).mean(dims, keepdim=True) + eps).sqrt().detach()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def rms_norm(self, x, shape, weight=None, eps=None):
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        y = x / (x.pow(2).mean(tuple(range(-len(shape), 0)), keepdim=True) + eps).sqrt().detach()
        return y if weight is None else y * weight

    def group_norm(self, x, groups, weight=None, bias=None, eps=1e-5):
        y = torch.cat([self.layer_norm(part, part.shape[1:], eps=eps) for part in x.chunk(groups, 1)], 1)
        over = (1, -1, *[1] * (x.ndim - 2))
        y = y if weight is None else y * weight.view(over)
        return y if bias is None else y + bias.view(over)


def inner(value):
    """Return True for activations of the network, and False for parameters and constants."""
    return isinstance(value, torch.Tensor) and value.requires_grad and not value.is_leaf


def visible_twin(model):
    """Return a copy of the model in which every attention is an explicit softmax."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    return twin


@contextmanager
def softmaxes(constant=False):
    """Collect the result of every softmax over (B, H, Q, K); if `constant`, no gradient flows through it."""
    found = []

    def recording(original):
        def softmax(*args, **kwargs):
            if args[0].dtype == torch.float64:
                kwargs.pop("dtype", None)  # Hugging Face would compute it in float32
            out = original(*args, **kwargs)
            # One softmax function calls another, so the same tensor is seen twice.
            if out.ndim == 4 and all(out is not other for other in found):
                if constant:
                    out = out.detach().requires_grad_()
                found.append(out)
            return out

        return softmax

    with (
        mock.patch.object(F, "softmax", recording(F.softmax)),
        mock.patch.object(torch, "softmax", recording(torch.softmax)),
        mock.patch.object(torch.Tensor, "softmax", recording(torch.Tensor.softmax)),
        mock.patch.object(F, "multi_head_attention_forward", dense_multi_head),
    ):
        yield found


def dense_multi_head(
    query,
    key,
    value,
    embed_dim,
    num_heads,
    in_proj_weight,
    in_proj_bias,
    bias_k,
    bias_v,
    add_zero_attn,
    dropout_p,
    out_proj_weight,
    out_proj_bias,
    key_padding_mask=None,
    attn_mask=None,
    **options,
):
    """Compute multi-head attention on (N, B, D) tokens as in its paper, as far as tested models need it."""
    assert bias_k is None
    assert bias_v is None
    assert not add_zero_attn
    assert not options.get("use_separate_proj_weight")
    projected = []
    for tokens, weight, bias in zip(
        (query, key, value), in_proj_weight.chunk(3), in_proj_bias.chunk(3), strict=True
    ):
        count, batch, width = tokens.shape
        states = tokens @ weight.T + bias
        projected.append(states.reshape(count, batch, num_heads, width // num_heads).permute(1, 2, 0, 3))
    q, k, v = projected
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        mask = attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(scores.shape)
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        scores = scores.masked_fill(padding, -math.inf) if padding.dtype == torch.bool else scores + padding
    mixed = torch.softmax(scores, -1) @ v
    joined = mixed.permute(2, 0, 1, 3).reshape(query.shape)
    return joined @ out_proj_weight.T + out_proj_bias, None
