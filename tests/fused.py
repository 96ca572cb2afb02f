"""Fused attention on the tape, and the same by plain operations."""

import torch
from torch import nn
from torch.nn import functional as F

from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape

SHAPE = (2, 3, 21, 8)
MASK = torch.linspace(-3, 2, 21 * 21).view(21, 21)
SETTINGS = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "masked": {"attn_mask": MASK},
    "boolean": {"attn_mask": (torch.arange(21)[:, None] - torch.arange(21)).abs() < 9},
    "causal": {"is_causal": True},
    "learned mask": {"attn_mask": nn.Parameter(MASK)},
}


def operands(dtype=torch.float32, shape=SHAPE):
    """Return views of one tensor, with tokens before heads, as in a Vision Transformer."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, dim = shape
    joint = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return [part.transpose(1, 2).requires_grad_() for part in joint.unbind(2)]


def recorded(query, key, value, *, network=None, head_fusion=None, **setting):
    """Run fused attention on the tape, with queries, keys and values that are all live.

    An identity linear layer makes their heads channels of the same tokens.
    """
    tape = Tape(nn.Identity(), network=network, head_fusion=head_fusion)
    recorder = Recorder(tape)
    parts = [query, key, value]
    learned = [torch.eye(part.shape[1] * part.shape[3], dtype=part.dtype) for part in parts]
    with recorder.recording():
        for part in parts:
            recorder.begin(part)
        inputs = [headed(part, weight) for part, weight in zip(parts, learned, strict=True)]
        output = F.scaled_dot_product_attention(*inputs, **setting)
    return output, tape


def headed(part, weight):
    batch, heads, tokens, dim = part.shape
    joined = F.linear(part.transpose(1, 2).reshape(batch, tokens, heads * dim), weight)
    return joined.view(batch, tokens, heads, dim).transpose(1, 2)


def put_out(tape):
    """Return the value that the last step computed."""
    return tape.steps[-1].outputs[0]


def attend(*inputs, gradients=False, **options):
    output, tape = recorded(*inputs, network="plain" if gradients else None, **options)
    (attention,) = tape.attentions
    return output, attention.weights


def reference(query, key, value, attn_mask=None, is_causal=False, scale=None):
    """Return A and the output from plain operations, for float64 inputs."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    weights = scores.softmax(-1)
    return weights, weights @ value


def double(setting):
    mask = setting.get("attn_mask")
    if mask is None or mask.dtype == torch.bool:
        return setting
    return {**setting, "attn_mask": mask.detach().double()}
