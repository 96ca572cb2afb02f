"""The attentions that are captured, of every kind and spelling."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitx
from tests import models, visible
from tests.oracle import close
from vitx import capture


def test_talking_heads():
    """A is what multiplies the values: heads are mixed before its softmax and after it."""
    model = models.timm_model("cait_xxs24_224").double().eval()
    images = models.FAMILIES["deit"].images(dtype=torch.float64)
    seen = []

    def attend(layer, x):
        q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        a = layer.proj_l((q * layer.scale @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(-1)
        seen.append(layer.proj_w(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return layer.proj((seen[-1] @ v).transpose(1, 2).flatten(2))

    slow = copy.deepcopy(model)
    for block in slow.blocks:
        block.attn.forward = attend.__get__(block.attn)
    score = slow(images)[:, 2].sum()
    with torch.no_grad(), capture(model, gradients=True) as trace:
        output = model(images)
        found = output[:, 2].sum()
    assert torch.allclose(found, score)
    assert close(trace.attentions(), seen)
    assert close(trace.gradients(found), torch.autograd.grad(score, seen))


def test_heads_that_are_mixed_and_normalized():
    """A is what multiplies the values: DeepViT's re-attention mixes and normalizes the heads of a softmax."""

    class Mixed(nn.Module):
        def __init__(self, heads):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(heads, heads))
            self.norm = nn.LayerNorm(heads)
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.uniform_(self.norm.bias, -0.5, 1.0)

        def forward(self, weights):
            mixed = torch.einsum("bhqk,hg->bgqk", weights, self.mix)
            return self.norm(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = models.deit().double().eval()
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop = Mixed(block.attn.num_heads).double()
    images = models.FAMILIES["deit"].images(dtype=torch.float64)
    seen, slow = [], copy.deepcopy(model)
    for block in slow.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, given, out: seen.append(out))
    score = slow(images)[:, 2].sum()
    with torch.no_grad(), capture(model, gradients=True) as trace:
        found = model(images)[:, 2].sum()
    assert close(trace.attentions(), seen)
    assert close(trace.gradients(found), torch.autograd.grad(score, seen))
    rows, identity = torch.eye(17, dtype=torch.float64)[0].expand(2, -1), torch.eye(17)
    for weights in reversed(seen):  # weights of any sign
        whole = weights.detach().mean(1).abs() + identity
        rows = torch.einsum("bq,bqk->bk", rows, whole / whole.sum(-1, keepdim=True))
    assert torch.allclose(vitx.explain(model, images).maps.flatten(1), rows[:, 1:], rtol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_differential_attention(fused):
    """Part of a second A is subtracted from the first, or part of its output from the output of the first."""
    model = models.timm_model("vit_dlittle_patch16_reg1_gap_256").double().eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = models.FAMILIES["deit"].images(dtype=torch.float64)
    slow = copy.deepcopy(model)
    for block in slow.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), visible.softmaxes() as softmaxes:
        slow(images)
    apart = [softmax[:, part::2] for softmax in softmaxes for part in (0, 1)]
    parts = [block.attn._compute_lambda().item() for block in model.blocks]
    joined = [s[:, ::2] - part * s[:, 1::2] for s, part in zip(softmaxes, parts, strict=True)]
    with torch.no_grad(), capture(model) as trace:
        model(images)
    assert close(trace.attentions(), apart if fused else joined)


class Heads(nn.Module):
    """A function of queries, keys and values, which a linear layer computes from tokens, (B, N, 32)."""

    def __init__(self, function, heads=4, key_heads=4):
        super().__init__()
        self.function, self.heads, self.key_heads = function, heads, key_heads
        self.qkv = nn.Linear(32, 8 * (heads + 2 * key_heads)).double()

    def split(self, tokens):
        sizes = [8 * self.heads, 8 * self.key_heads, 8 * self.key_heads]
        return [t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.qkv(tokens).split(sizes, -1)]

    def forward(self, tokens):
        return self.function(*self.split(tokens))


TOKENS = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def some_mask(*shape):
    """Return a random mask with no row that is completely masked."""
    return (torch.rand(shape) > 0.4) | torch.eye(shape[-2], shape[-1], dtype=torch.bool)


@pytest.mark.parametrize(
    "make_options",
    [
        dict,
        lambda: {"scale": 0.7},
        lambda: {"is_causal": True},
        lambda: {"attn_mask": some_mask(6, 6)},
        lambda: {"attn_mask": some_mask(2, 1, 6, 6)},
        lambda: {"attn_mask": torch.randn(4, 6, 6, dtype=torch.float64), "scale": 0.3},
        lambda: {"enable_gqa": True},
        lambda: {"enable_gqa": True, "is_causal": True},
    ],
    ids=["plain", "scale", "causal", "bool", "bool per image", "float", "grouped", "grouped causal"],
)
def test_options_of_scaled_dot_product_attention(make_options):
    options = make_options()
    weight = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    model = Heads(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        key_heads=2 if "enable_gqa" in options else 4,
    )
    with capture(model, gradients=True) as trace:
        out = model(TOKENS)
    q, k, v = model.split(TOKENS)
    found, gradients = trace.attentions(), trace.gradients((out * weight).sum())

    keys, values = (t if t.shape[1] == 4 else t.repeat_interleave(2, 1) for t in (k, v))
    scores = q @ keys.transpose(2, 3) * options.get("scale", 1 / math.sqrt(8))
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.tensor([[column <= row for column in range(6)] for row in range(6)])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    attention = torch.softmax(scores, -1)
    assert close([out], [attention @ values])
    assert close(found, [attention])
    assert close(gradients, torch.autograd.grad((attention @ values * weight).sum(), [attention]))


def multi_head_masks():
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    return {
        "plain": {},
        "bool mask": {"attn_mask": ~some_mask(6, 6)},
        "float mask": {"attn_mask": torch.randn(6, 6, dtype=torch.float64)},
        "mask per head": {"attn_mask": torch.randn(2 * 4, 6, 6, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.double() * -3},
        "mask and padding": {
            "attn_mask": torch.randn(6, 6, dtype=torch.float64),
            "key_padding_mask": padding,
        },
        "bool mask and padding": {
            "attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
            "key_padding_mask": padding,
        },
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masks", list(multi_head_masks()))
def test_multi_head_attention(masks, need_weights):
    options = multi_head_masks()[masks]
    layer = models.spread(nn.MultiheadAttention(32, 4, batch_first=True)).double().eval()
    tokens = torch.randn(2, 6, 32, dtype=torch.float64)
    weight = torch.randn(2, 6, 32, dtype=torch.float64)
    plain, plain_weights = layer(tokens, tokens, tokens, need_weights=need_weights, **options)
    with capture(layer, gradients=True) as trace:
        out, out_weights = layer(tokens, tokens, tokens, need_weights=need_weights, **options)
    found, gradients = trace.attentions(), trace.gradients((out * weight).sum())
    assert torch.equal(plain, out)
    assert (out_weights is None) == (plain_weights is None)
    assert out_weights is None or torch.equal(out_weights, plain_weights)

    with visible.softmaxes() as softmaxes:
        dense, _ = layer(tokens, tokens, tokens, need_weights=need_weights, **options)
    assert close([out], [dense])
    assert close(found, softmaxes)
    assert close(gradients, torch.autograd.grad((dense * weight).sum(), softmaxes))


def test_multi_head_attention_with_tokens_first():
    layer = models.spread(nn.MultiheadAttention(32, 4)).double().eval()
    tokens = torch.randn(6, 2, 32, dtype=torch.float64)
    with capture(layer) as trace:
        layer(tokens, tokens, tokens)
    with visible.softmaxes() as wanted:
        layer(tokens, tokens, tokens)
    assert close(trace.attentions(), wanted)


def test_transformer_encoder():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).double()
    encoder = models.spread(encoder).eval()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    with visible.softmaxes() as wanted:
        encoder(tokens)
    with torch.no_grad():
        with capture(encoder) as trace:
            seen = encoder(tokens)
        plain = encoder(tokens)
    assert close(trace.attentions(), wanted)
    assert torch.allclose(seen, plain, atol=1e-12)  # without the capture, PyTorch takes its fast path


def test_einsum_attention():
    """A softmax is multiplied by the values in an einsum."""

    def attend(q, k, v):
        attention = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", attention, v)

    model = Heads(attend)
    with capture(model, gradients=True) as trace:
        out = model(TOKENS)
    q, k, v = model.split(TOKENS)
    wanted = (q @ k.transpose(2, 3)).softmax(-1)
    assert close(trace.attentions(), [wanted])
    assert close(
        trace.gradients(out.square().sum()), torch.autograd.grad((wanted @ v).square().sum(), [wanted])
    )
