"""Fused attention seen from outside: the same bits out of it, and its gradients."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitx.attention import fused, tiles
from vitx.attention.fused import SharedAttention, attend
from vitx.attention.layer import StoredAttention

SHAPE = (2, 3, 21, 8)
MASK = torch.linspace(-3, 2, 21 * 21).view(21, 21)
SETTINGS = {
    "plain": {},
    "scaled": {"scale": 0.7},
    "masked": {"attn_mask": MASK},
    "boolean": {"attn_mask": (torch.arange(21)[:, None] - torch.arange(21)).abs() < 9},
    "causal": {"is_causal": True},
    "learned mask": {"attn_mask": torch.nn.Parameter(MASK)},
}


def operands(dtype=torch.float32, shape=SHAPE):
    """As in a Vision Transformer: views of one tensor, tokens before heads."""
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, dim = shape
    joint = torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return [part.transpose(1, 2).requires_grad_() for part in joint.unbind(2)]


def reference(query, key, value, attn_mask=None, is_causal=False, scale=None):
    """A and the output, in float64."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_output_is_the_same_to_the_last_bit(name, gradients, dtype):
    setting = SETTINGS[name]
    if "attn_mask" in setting and setting["attn_mask"].dtype != torch.bool:
        setting = {
            "attn_mask": setting["attn_mask"].detach().to(dtype).requires_grad_(name == "learned mask")
        }
    with torch.set_grad_enabled(gradients):
        output, _ = attend(*operands(dtype), **setting, gradients=gradients)
        wanted = F.scaled_dot_product_attention(*operands(dtype), **setting)
    assert torch.equal(output, wanted)
    assert output.stride() == wanted.stride()
    assert output.requires_grad == wanted.requires_grad


@pytest.mark.parametrize("name", SETTINGS)
def test_weights(name):
    with torch.no_grad():
        _, found = attend(*operands(), **SETTINGS[name], gradients=False)
    wanted, _ = reference(*(t.double() for t in operands()), **double(SETTINGS[name]))
    assert torch.allclose(found.weights().double(), wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("tile", [2**20, 3 * 21 * 5])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("queries", [slice(None), slice(2), slice(7, 9), slice(0)])
def test_gradients(monkeypatch, name, tile, queries):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 4)
    inputs = operands()
    output, found = attend(*inputs, **SETTINGS[name], gradients=True)
    assert isinstance(found, SharedAttention) == (name != "learned mask")
    factor = torch.linspace(-1, 2, output.numel()).view_as(output)
    (output * factor)[:, :, queries].sum().backward()
    exact = [t.detach().double().requires_grad_() for t in operands()]
    (reference(*exact, **double(SETTINGS[name]))[1] * factor)[:, :, queries].sum().backward()
    for got, wanted in zip(inputs, exact, strict=True):
        assert torch.allclose(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "scaled"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("images", [2, 5])  # less and more than heads
@pytest.mark.parametrize("tile", [5 * 21, 2 * 21 * 21, 2**20])
def test_the_fused_heads_of_a_small_attention_are_kept(monkeypatch, name, fusion, images, tile):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    inputs = operands(shape=(images, *SHAPE[1:]))
    with torch.no_grad():
        output, found = attend(*inputs, **SETTINGS[name], gradients=False, head_fusion=fusion)
    assert isinstance(found, StoredAttention)
    weights, wanted = reference(*(t.double() for t in inputs), **SETTINGS[name])
    fuse = {"mean": weights.mean, "max": weights.amax, "min": weights.amin}[fusion]
    assert torch.allclose(found.weights()[:, 0].double(), fuse(1), rtol=2e-6, atol=1e-9)
    assert torch.allclose(output.double(), wanted, rtol=1e-5, atol=1e-6)
    assert output.stride() == F.scaled_dot_product_attention(*inputs).stride()


def test_the_fused_heads_of_an_image_do_not_depend_on_those_beside_it():
    inputs = operands(shape=(5, 3, 197, 64))
    with torch.no_grad():
        outputs, found = attend(*inputs, gradients=False, head_fusion="mean")
        output, alone = attend(*(t[3:4] for t in inputs), gradients=False, head_fusion="mean")
    assert torch.equal(alone.weights(), found.weights()[3:4])
    assert torch.equal(output, outputs[3:4])


@pytest.mark.parametrize(
    ("name", "dtype", "gradients", "small"),
    [
        ("plain", torch.float32, False, 3 * 21 * 21 - 1),
        ("plain", torch.bfloat16, False, 2**20),
        ("plain", torch.float32, True, 2**20),
        ("masked", torch.float32, False, 2**20),
        ("causal", torch.float32, False, 2**20),
    ],
)
def test_all_other_attention_is_computed_anew(monkeypatch, name, dtype, gradients, small):
    monkeypatch.setattr(fused, "_SMALL", small)
    with torch.set_grad_enabled(gradients):
        output, found = attend(*operands(dtype), **SETTINGS[name], gradients=gradients, head_fusion="max")
        wanted = F.scaled_dot_product_attention(*operands(dtype), **SETTINGS[name])
    assert not isinstance(found, StoredAttention)
    assert torch.equal(output, wanted)


@pytest.mark.parametrize("head_fusion", [None, "mean"])
def test_without_gradients_the_graph_stays_as_it_is(head_fusion):
    inputs, others = operands(), operands()
    output, found = attend(*inputs, gradients=False, head_fusion=head_fusion)
    output.square().sum().backward()
    F.scaled_dot_product_attention(*others).square().sum().backward()
    for one, other in zip(inputs, others, strict=True):
        assert torch.equal(one.grad, other.grad)
    wanted, _ = reference(*(t.double() for t in inputs))
    assert torch.allclose(found.weights().double(), wanted, rtol=2e-6, atol=1e-9)


def test_tiles_are_read_on_the_way():
    inputs = operands()
    output, found = attend(*inputs, gradients=True)
    weights, d_weights = shown = torch.full((2, 2, 3, 21, 21), torch.nan)

    def reader(tiles):
        for tile in tiles:
            for whole, part in zip(shown, (tile.weights, tile.gradient), strict=True):
                whole[tile.images, tile.heads, tile.rows] = part
            yield tile

    found.reader = reader
    gradient = torch.linspace(-1, 1, output.numel()).view_as(output)
    torch.autograd.grad(output, inputs, gradient)
    exact = [t.double() for t in inputs]
    wanted, _ = reference(*exact)
    assert torch.allclose(weights.double(), wanted, atol=1e-6)
    assert torch.allclose(d_weights.double(), gradient.double() @ exact[2].mT, atol=1e-5)


def test_rows_that_nothing_depends_on_are_shown_but_not_computed():
    inputs = operands()
    output, found = attend(*inputs, gradients=True)
    shown = []

    def reader(tiles):
        for tile in tiles:
            shown.append(tile)
            yield tile

    found.reader = reader
    gradient = torch.zeros_like(output)
    gradient[:, :, 3:5] = 1
    torch.autograd.grad(output, inputs, gradient)
    assert {(tile.rows.start, tile.rows.stop) for tile in shown} == {(0, 3), (3, 5), (5, 21)}
    for tile in shown:
        assert ("weights" in vars(tile)) == (tile.rows.start == 3)


def not_shared(**options):
    with torch.enable_grad():
        output, found = attend(*operands(), **options, gradients=True)
    assert not isinstance(found, SharedAttention)
    return output, found


def test_the_plain_kernel_has_no_log_sum_exp():
    with sdpa_kernel(SDPBackend.MATH):
        output, found = not_shared()
    assert output.grad_fn is not None
    wanted, _ = reference(*(t.double() for t in operands()))
    assert torch.allclose(found.weights().double(), wanted, atol=1e-6)


def test_autocast_is_left_to_torch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = not_shared()
        assert torch.equal(output, F.scaled_dot_product_attention(*operands()))


def test_hooks_on_saved_tensors_see_the_calls_of_the_model():
    seen = [[], []]
    for packed, call in zip(
        seen, (not_shared, lambda: F.scaled_dot_product_attention(*operands())), strict=True
    ):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, packed=packed: packed.append(t) or t, lambda t: t
        ):
            call()
    assert len(seen[0]) == len(seen[1]) > 0


def test_grouped_queries():
    query, key, value = operands()
    options = {"enable_gqa": True}
    output, found = attend(query, key[:, :1], value[:, :1], **options, gradients=True)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], **options))
    wanted, _ = reference(query.double(), key[:, :1].double(), value[:, :1].double())
    assert torch.allclose(found.weights().double(), wanted, atol=1e-6)


def test_inference_mode():
    with torch.inference_mode():
        inputs = [t.clone() for t in operands()]
        output, found = attend(*inputs, gradients=False)
        assert torch.equal(output, F.scaled_dot_product_attention(*inputs))
        wanted, _ = reference(*(t.double() for t in inputs))
        assert torch.allclose(found.weights().double(), wanted, atol=1e-6)


def test_a_change_in_place_is_noticed():
    output, _ = attend(*operands(), gradients=True)
    score = (output * output).sum()
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_second_derivatives_are_refused():
    inputs = operands()
    output, _ = attend(*inputs, gradients=True)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_outlives_the_call(gradients):
    """Neither a graph that was made to be read, nor a circle of output and attention."""
    inputs = operands()
    with torch.set_grad_enabled(gradients):
        output, found = attend(*inputs, gradients=gradients)
    assert found._log_sum_exp.grad_fn is None
    gone = [weakref.ref(tensor) for tensor in (output, *inputs)]
    if gradients:
        output.sum().backward()
    del output, inputs, found
    assert [ref() for ref in gone] == [None] * 4
