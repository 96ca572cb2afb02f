"""What is captured in one forward pass."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vitx
from tests import models, oracle
from vitx import VitxError, capture

FAMILIES = sorted(models.FAMILIES)


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def score_of(output):
    return logits_of(output)[:, 2].sum()


def close(found, wanted, tolerance=1e-9):
    return len(found) == len(wanted) and all(
        a.shape == b.shape and (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_attentions_and_gradients_equal_the_oracle(name):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with capture(model, gradients=True) as trace:
        output = model(images)
    tolerance = 1e-9 if family.exact else 1e-5
    assert close(trace.attentions(), wanted.attentions, tolerance)
    assert close(trace.gradients(score_of(output)), wanted.gradients, tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_output_is_the_same_to_the_bit(name, gradients):
    model, images = models.built(name), models.FAMILIES[name].images()
    with torch.set_grad_enabled(gradients):
        plain = logits_of(model(images))
        with capture(model, gradients=gradients):
            seen = logits_of(model(images))
    assert torch.equal(plain, seen)


def test_attentions_are_rows_of_shares():
    model = models.built("deit")
    with torch.no_grad(), capture(model) as trace:
        model(models.FAMILIES["deit"].images())
    assert [tuple(a.shape) for a in trace.attentions()] == [(2, 3, 17, 17)] * 3
    for attention in trace.attentions():
        assert torch.allclose(attention.sum(-1), torch.ones(()))


@pytest.mark.parametrize("options", [{}, {"gradients": True}])
def test_the_gradients_of_the_model_are_the_same(options):
    found = {}
    for name in ("watched", "alone"):
        model = copy.deepcopy(models.built("deit"))
        with capture(model, **options) if name == "watched" else nullcontext():
            logits = model(models.FAMILIES["deit"].images())
        logits[:, 1].sum().backward()
        found[name] = [p.grad.clone() for p in model.parameters()]
    for watched, alone in zip(*found.values(), strict=True):
        assert torch.equal(watched, alone)


def test_no_parameter_gradient_is_made():
    model = models.deit().eval()
    with capture(model, gradients=True) as trace:
        output = model(models.FAMILIES["deit"].images())
    trace.gradients(score_of(output))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_attentions_are_float32():
    model = models.deit().bfloat16().eval()
    with capture(model, gradients=True) as trace:
        output = model(models.FAMILIES["deit"].images(dtype=torch.bfloat16))
    assert {a.dtype for a in trace.attentions()} == {torch.float32}
    assert {g.dtype for g in trace.gradients(score_of(output))} == {torch.float32}


def test_what_runs_after_the_context_is_not_seen():
    model, images = models.built("deit"), models.FAMILIES["deit"].images()
    with torch.no_grad(), capture(model) as trace:
        model(images)
    with torch.no_grad():
        model(images)
    assert len(trace.attentions()) == 3


class TestRefusals:
    def test_not_a_module(self):
        with pytest.raises(VitxError, match="found function"), capture(lambda images: images):
            pass

    def test_no_attention(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        with capture(model) as trace:
            model(torch.rand(1, 3, 8, 8))
        with pytest.raises(VitxError, match="no attention between tokens was found"):
            trace.attentions()

    def test_nothing_ran(self):
        with capture(models.built("deit")) as trace:
            pass
        with pytest.raises(VitxError, match="no attention between tokens was found"):
            trace.attentions()

    def test_two_passes(self):
        model, images = models.built("deit"), models.FAMILIES["deit"].images()
        with torch.no_grad(), capture(model) as trace:
            model(images)
            model(images)
        with pytest.raises(VitxError, match="2 forward passes"):
            trace.attentions()

    def test_gradients_that_were_not_captured(self):
        model = models.built("deit")
        with capture(model) as trace:
            output = model(models.FAMILIES["deit"].images())
        with pytest.raises(VitxError, match="captured without gradients"):
            trace.gradients(score_of(output))

    def test_gradients_of_something_else(self):
        model = models.built("deit")
        with capture(model, gradients=True) as trace:
            model(models.FAMILIES["deit"].images())
        with pytest.raises(VitxError, match="does not depend on any attention"):
            trace.gradients(torch.ones(()))

    @pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
    def test_multi_head_attention_with_added_keys(self, options):
        layer = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
        tokens = torch.rand(1, 5, 8)
        with capture(layer) as trace:
            layer(tokens, tokens, tokens)
        with pytest.raises(
            VitxError, match=r"not one N x N matrix .*: \[\(1, 5, 6\)\]\): use vitx.explain$"
        ) as error:
            trace.attentions()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["deit", "siglip", "hf vit, sdpa", "torchvision"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_of_a_pass_without_autograd(name, mode):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with mode(), capture(model, gradients=True) as trace:
        score = score_of(model(images))
    assert not score.requires_grad
    assert close(trace.attentions(), wanted.attentions)
    assert close(trace.gradients(score), wanted.gradients)


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_that_is_called_by_keyword(grad):
    model = models.built("hf vit, sdpa", torch.float64)
    images = models.FAMILIES["hf vit, sdpa"].images(dtype=torch.float64)
    wanted = oracle.observe(model, images, lambda logits: logits[:, 2], "plain")
    with torch.set_grad_enabled(grad), capture(model, gradients=True) as trace:
        score = score_of(model(pixel_values=images))
    assert trace.passes == 1
    assert close(trace.attentions(), wanted.attentions)
    assert close(trace.gradients(score), wanted.gradients)


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
    score = score_of(slow(images))
    with torch.no_grad(), capture(model, gradients=True) as trace:
        output = model(images)
        found = score_of(output)
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
    score = score_of(slow(images))
    with torch.no_grad(), capture(model, gradients=True) as trace:
        found = score_of(model(images))
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
    with torch.no_grad(), oracle._softmaxes() as softmaxes:
        slow(images)
    apart = [softmax[:, part::2] for softmax in softmaxes for part in (0, 1)]
    parts = [block.attn._compute_lambda().item() for block in model.blocks]
    joined = [s[:, ::2] - part * s[:, 1::2] for s, part in zip(softmaxes, parts, strict=True)]
    with torch.no_grad(), capture(model) as trace:
        model(images)
    assert close(trace.attentions(), apart if fused else joined)


def test_a_score_of_several_outputs():
    """One of the outputs is computed from the other two."""
    name = "hf distilled deit, sdpa"
    model, images = models.built(name, torch.float64), models.FAMILIES[name].images(dtype=torch.float64)
    with capture(model, gradients=True) as trace:
        out = model(images)
        score = (out.logits[:, 1] + 2 * out.cls_logits[:, 0] - out.distillation_logits[:, 3]).sum()
    found = trace.gradients(score)
    eager = models.built("hf distilled deit, eager", torch.float64)
    wanted = oracle.observe(eager, images, lambda logits: logits[:, 1], "plain")
    twin = oracle.visible_twin(eager)
    with torch.enable_grad(), oracle._softmaxes() as softmaxes:
        out = twin(images)
    score = (out.logits[:, 1] + 2 * out.cls_logits[:, 0] - out.distillation_logits[:, 3]).sum()
    square = [a for a in softmaxes if a.shape[-1] == a.shape[-2]]
    assert close(found, torch.autograd.grad(score, square))
    assert close(trace.attentions(), wanted.attentions)


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

    with oracle._softmaxes() as softmaxes:
        dense, _ = layer(tokens, tokens, tokens, need_weights=need_weights, **options)
    assert close([out], [dense])
    assert close(found, softmaxes)
    assert close(gradients, torch.autograd.grad((dense * weight).sum(), softmaxes))


def test_multi_head_attention_with_tokens_first():
    layer = models.spread(nn.MultiheadAttention(32, 4)).double().eval()
    tokens = torch.randn(6, 2, 32, dtype=torch.float64)
    with capture(layer) as trace:
        layer(tokens, tokens, tokens)
    with oracle._softmaxes() as wanted:
        layer(tokens, tokens, tokens)
    assert close(trace.attentions(), wanted)


def test_transformer_encoder():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).double()
    encoder = models.spread(encoder).eval()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    with oracle._softmaxes() as wanted:
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


class TestPrinted:
    """`print(trace)`, the first thing to look at when a map is surprising."""

    def test_lists_the_steps(self):
        model, images = models.built("deit"), models.FAMILIES["deit"].images()
        with torch.no_grad(), capture(model) as trace:
            model(images)
        head, *rows = str(trace).splitlines()
        assert head.split() == ["step", "module", "operator", "output", "relevance"]
        assert len(rows) == len(trace.tape.steps)
        assert [int(row.split()[0]) for row in rows] == list(range(len(rows)))
        assert rows[0].split()[-7:] == ["2", "x", "48", "x", "4", "x", "4"]
        assert sum("_scaled_dot_product" in row for row in rows) == 3
        assert rows[-1].split()[-3:] == ["2", "x", str(models.CLASSES)]
        assert not any(row != row.rstrip() for row in rows)

    def test_an_empty_one(self):
        with capture(models.built("deit")) as trace:
            pass
        assert str(trace).split() == ["step", "module", "operator", "output", "relevance"]
