"""Fused attention on the tape: its output, the same to the bit, its A, and its gradients."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.fused import SETTINGS, SHAPE, attend, double, operands, put_out, recorded, reference
from vitx.functional import tiles
from vitx.tape import kernels
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.walk import gradients as gradients_of


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


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights(name, gradients):
    with torch.no_grad():
        _, found = attend(*operands(), **SETTINGS[name], gradients=gradients)
    wanted, _ = reference(*(t.double() for t in operands()), **double(SETTINGS[name]))
    assert found.shape == (2, 3, 21, 21)
    assert torch.allclose(found.matrix().double(), wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("tile", [2**20, 3 * 21 * 5])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("queries", [slice(None), slice(2), slice(7, 9), slice(0)])
def test_gradients(monkeypatch, name, tile, queries):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 4)
    with torch.no_grad():
        output, tape = recorded(*operands(), network="plain", **SETTINGS[name])
    factor = torch.linspace(-1, 2, output.numel()).view_as(output)
    outer = torch.zeros_like(output)
    outer[:, :, queries] = factor[:, :, queries]
    (attention,) = tape.attentions
    with torch.no_grad():
        walk = gradients_of(tape, {put_out(tape): outer}, [attention.value], whole=True)
    exact = [t.detach().double().requires_grad_() for t in operands()]
    weights, mixed = reference(*exact, **double(SETTINGS[name]))
    weights.retain_grad()
    (weights @ exact[2] * outer).sum().backward()
    for image, wanted in zip(tape.images, exact, strict=True):
        assert torch.allclose(walk.arrived[image].double(), wanted.grad, rtol=1e-4, atol=1e-6)
    found = attention.weights.gradient(attention.arrived(walk.passed[attention.value]))
    assert torch.allclose(found.double(), weights.grad, rtol=1e-4, atol=1e-6)
    assert torch.allclose(mixed.float(), output, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tile", [2**20, 3 * 21 * 5])
@pytest.mark.parametrize("name", SETTINGS)
def test_in_the_linearized_network_a_is_a_constant(monkeypatch, name, tile):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", 4)
    with torch.no_grad():
        output, tape = recorded(*operands(), network="linearised", **SETTINGS[name])
    outer = torch.linspace(-1, 2, output.numel()).view_as(output)
    with torch.no_grad():
        arrived = gradients_of(tape, {put_out(tape): outer}, [], whole=True).arrived
    weights, _ = reference(*(t.detach().double() for t in operands()), **double(SETTINGS[name]))
    query, key, value = (arrived.get(image) for image in tape.images)
    assert torch.allclose(value.double(), weights.mT @ outer.double(), rtol=1e-4, atol=1e-6)
    for other in (query, key):
        assert other is None or not other.any()


@pytest.mark.parametrize("name", ["plain", "scaled"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("images", [2, 5])  # fewer and more than heads
@pytest.mark.parametrize("tile", [5 * 21, 2 * 21 * 21, 2**20])
def test_the_fused_heads_of_a_small_attention_are_kept(monkeypatch, name, fusion, images, tile):
    monkeypatch.setattr(tiles, "_room", lambda device: tile)
    inputs = operands(shape=(images, *SHAPE[1:]))
    with torch.no_grad():
        output, found = attend(*inputs, **SETTINGS[name], head_fusion=fusion)
    assert found.shape == (images, 1, 21, 21)
    weights, wanted = reference(*(t.double() for t in inputs), **SETTINGS[name])
    fuse = {"mean": weights.mean, "max": weights.amax, "min": weights.amin}[fusion]
    assert torch.allclose(found.matrix()[:, 0].double(), fuse(1), rtol=2e-6, atol=1e-9)
    assert torch.allclose(output.double(), wanted, rtol=1e-5, atol=1e-6)
    assert output.stride() == F.scaled_dot_product_attention(*inputs).stride()


def test_the_fused_heads_of_an_image_do_not_depend_on_those_beside_it():
    inputs = operands(shape=(5, 3, 197, 64))
    with torch.no_grad():
        outputs, found = attend(*inputs, head_fusion="mean")
        output, alone = attend(*(t[3:4] for t in inputs), head_fusion="mean")
    assert torch.equal(alone.matrix(), found.matrix()[3:4])
    assert torch.equal(output, outputs[3:4])


@pytest.mark.parametrize(
    ("name", "dtype", "small"),
    [
        ("plain", torch.float32, 3 * 21 * 21 - 1),
        ("plain", torch.bfloat16, 2**20),
        ("masked", torch.float32, 2**20),
        ("causal", torch.float32, 2**20),
    ],
)
def test_all_other_attention_is_computed_anew(monkeypatch, name, dtype, small):
    monkeypatch.setattr(kernels, "SMALL", small)
    with torch.no_grad():
        output, found = attend(*operands(dtype), **SETTINGS[name], head_fusion="max")
        wanted = F.scaled_dot_product_attention(*operands(dtype), **SETTINGS[name])
    assert found.shape == (2, 3, 21, 21)
    assert torch.equal(output, wanted)


def test_heads_that_are_not_known_to_be_channels_are_not_fused():
    """For example, the model may fold windows into the dimension of the heads."""
    inputs = operands()
    tape = Tape(nn.Identity(), head_fusion="mean")
    recorder = Recorder(tape)
    with torch.no_grad(), recorder.recording():
        for part in inputs:
            recorder.begin(part)
        output = F.scaled_dot_product_attention(*inputs)
    assert torch.equal(output, F.scaled_dot_product_attention(*inputs))
    found = tape.attentions[0].weights
    wanted, _ = reference(*(t.double() for t in inputs))
    assert torch.allclose(found.matrix().flatten(0, 1).double(), wanted.flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("network", [None, "plain", "linearised"])
def test_the_graph_stays_as_it_is(network):
    inputs, others = operands(), operands()
    output, tape = recorded(*inputs, network=network)
    output.square().sum().backward()
    F.scaled_dot_product_attention(*others).square().sum().backward()
    for one, other in zip(inputs, others, strict=True):
        assert torch.equal(one.grad, other.grad)
    wanted, _ = reference(*(t.double() for t in inputs))
    assert torch.allclose(tape.attentions[0].weights.matrix().double(), wanted, rtol=2e-6, atol=1e-9)


def attended_in_small_tiles(monkeypatch, rows):
    monkeypatch.setattr(tiles, "_room", lambda device: 21 * 5)
    monkeypatch.setattr(tiles, "_FEWEST_ROWS", rows)
    inputs = operands()
    with torch.no_grad():
        return inputs, *attend(*inputs, gradients=True)


def test_tiles_come_with_their_gradient(monkeypatch):
    inputs, output, found = attended_in_small_tiles(monkeypatch, rows=4)
    weights, d_weights = shown = torch.full((2, 2, 3, 21, 21), torch.nan)
    gradient = torch.linspace(-1, 1, output.numel()).view_as(output)
    for tile in found.with_gradient(gradient).tiles():
        for whole, part in zip(shown, (tile.weights, tile.gradient), strict=True):
            whole[tile.images, tile.heads, tile.rows] = part
    exact = [t.detach().double() for t in inputs]
    wanted, _ = reference(*exact)
    assert torch.allclose(weights.double(), wanted, atol=1e-6)
    assert torch.allclose(d_weights.double(), gradient.double() @ exact[2].mT, atol=1e-5)


def test_rows_that_nothing_arrived_at_are_not_computed(monkeypatch):
    inputs, output, found = attended_in_small_tiles(monkeypatch, rows=5)
    with torch.no_grad():
        computed, compute = [], found.compute
        rows = torch.zeros_like(output)
        rows[:, :, 5:10] = 1
        monkeypatch.setattr(found, "compute", lambda part: computed.append(part) or compute(part))
        back = found.transposed(rows)
    assert {(part[2].start, part[2].stop) for part in computed} == {(5, 10)}
    wanted, _ = reference(*(t.detach().double() for t in inputs))
    assert torch.allclose(back.double(), wanted.mT @ rows.double(), rtol=1e-4, atol=1e-6)


def test_the_plain_kernel_has_no_log_sum_exp():
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        output, found = attend(*operands(), gradients=True)
    assert output.grad_fn is not None
    wanted, _ = reference(*(t.double() for t in operands()))
    assert torch.allclose(found.matrix().double(), wanted, atol=1e-6)


def test_autocast_is_left_to_torch():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = attend(*operands(), gradients=True)
        assert torch.equal(output, F.scaled_dot_product_attention(*operands()))


def test_hooks_on_saved_tensors_see_the_calls_of_the_model():
    seen = [[], []]
    calls = (F.scaled_dot_product_attention, lambda *inputs: recorded_as_it_is(*inputs)[0])
    for packed, call in zip(seen, calls, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, packed=packed: packed.append(t) or t, lambda t: t
        ):
            call(*operands())
    assert len(seen[0]) == len(seen[1]) > 0
    assert all(map(torch.equal, *seen))


def recorded_as_it_is(*inputs, **setting):
    tape = Tape(nn.Identity(), network="plain")
    recorder = Recorder(tape)
    with recorder.recording():
        for part in inputs:
            recorder.begin(part)
        return F.scaled_dot_product_attention(*inputs, **setting), tape


@pytest.mark.parametrize("gradients", [False, True])
def test_grouped_queries(gradients):
    query, key, value = operands()
    options = {"enable_gqa": True}
    with torch.no_grad():
        output, tape = recorded(
            *(query, key[:, :1], value[:, :1]), **options, network="plain" if gradients else None
        )
    assert torch.equal(output, F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], **options))
    wanted, _ = reference(query.double(), key[:, :1].double(), value[:, :1].double())
    found = tape.attentions[0].weights
    assert torch.allclose(found.matrix().double(), wanted, atol=1e-6)
    if gradients:
        outer = torch.linspace(-1, 1, output.numel()).view_as(output)
        exact = [t.detach().double().requires_grad_() for t in (query, key[:, :1], value[:, :1])]
        (reference(*exact)[1] * outer).sum().backward()
        with torch.no_grad():
            walk = gradients_of(tape, {put_out(tape): outer}, [], whole=True)
        for image, part in zip(tape.images, exact, strict=True):
            assert torch.allclose(walk.arrived[image].double(), part.grad, rtol=1e-4, atol=1e-6)


def test_inference_mode():
    with torch.inference_mode():
        inputs = [t.clone() for t in operands()]
        output, found = attend(*inputs)
        assert torch.equal(output, F.scaled_dot_product_attention(*inputs))
        wanted, _ = reference(*(t.double() for t in inputs))
        assert torch.allclose(found.matrix().double(), wanted, atol=1e-6)


def test_a_change_in_place_is_noticed():
    output, _ = attend(*operands(), gradients=True)
    score = (output * output).sum()
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_derivatives_are_those_of_torch():
    inputs, others = operands(torch.float64), operands(torch.float64)
    found = []
    with sdpa_kernel(SDPBackend.MATH):  # the other kernel has no second derivative
        for one, call in ((inputs, attend), (others, lambda *t: (F.scaled_dot_product_attention(*t), None))):
            output, _ = call(*one)
            (gradient,) = torch.autograd.grad(output.square().sum(), one[:1], create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), one))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_outlives_the_call(gradients):
    """No graph that was made for reading and no cycle of values and steps stays alive."""
    inputs = operands()
    with torch.set_grad_enabled(gradients):
        output, tape = recorded(*inputs, network="plain" if gradients else None)
    gone = [weakref.ref(tensor) for tensor in (output, *inputs)]
    if gradients:
        output.sum().backward()
    del output, inputs, tape
    assert [ref() for ref in gone] == [None] * 4
