"""The linearized network has the same values, and the parts of the score sum to it."""

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn
from torch.nn import functional as F

from tests import models, visible
from tests.kinds import KINDS
from tests.plain_vits import IMAGES, WIDTH, vit
from vitx import VitxError, explain, explain_methods
from vitx.tape.contraction import across
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.walk import gradients

WEIGHTS = torch.rand(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5


def channels_first(call):
    return lambda x: call(x.transpose(1, 2)).transpose(1, 2)


CALLS = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu by hand, tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.797 * (x + 0.0447 * x.pow(3)))),
    "silu by hand": lambda x: x * x.sigmoid(),
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "hardswish in place": lambda x: F.hardswish(x.clone(), True),
    "elu in place": lambda x: F.elu(x.clone(), 0.7, True),
    "a gate in place": lambda x: x.sigmoid().mul_(x),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "relu in place": lambda x: x.clone().relu_(),
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "sine": lambda x: torch.sin(3 * x),
    "squared relu": lambda x: F.relu(x) ** 2,
    "glu": lambda x: F.glu(torch.cat([x, x.flip(2)], -1)),
    "SwiGLU": lambda x: F.silu(x[..., : WIDTH // 2]).repeat(1, 1, 2) * x,
    "GEGLU, parts of one": lambda x: torch.cat([x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1])] * 2, -1),
    "squeeze and excitation": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "softcap": lambda x: 5 * torch.tanh(x / 5),
    "layer norm by hand": lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt(),
    "layer norm by hand, rsqrt": lambda x: (
        (x - x.mean(-1, True)) * (x.var(-1, keepdim=True) + 1).rsqrt() + 0.3
    ),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,), WEIGHTS[0]),
    "rms norm by hand": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "lerp": lambda x: x.lerp(F.gelu(x), WEIGHTS[0]),
    "lerp to a constant": lambda x: torch.lerp(x, WEIGHTS[1], 0.3),
    "lerp by a gate, in place": lambda x: x.clone().lerp_(F.normalize(x, dim=-1), x.sigmoid()),
    "addcmul": lambda x: torch.addcmul(x, F.gelu(x), WEIGHTS[0], value=0.5),
    "addcmul to a constant": lambda x: torch.addcmul(WEIGHTS[1], x, x.sigmoid()),
    "addcmul in place": lambda x: x.clone().addcmul_(WEIGHTS[0], x.flip(2)),
    "addcdiv": lambda x: torch.addcdiv(x, F.gelu(x), x.norm(dim=-1, keepdim=True), value=0.5),
    "addcdiv of a constant": lambda x: torch.addcdiv(x, WEIGHTS[0], x.norm(dim=-1, keepdim=True)),
    "over its length": lambda x: x / x.norm(dim=-1, keepdim=True),
    "group norm": channels_first(lambda x: F.group_norm(x, 4, WEIGHTS[0], WEIGHTS[1])),
    "batch norm": channels_first(lambda x: F.batch_norm(x, *WEIGHTS)),
    "instance norm": channels_first(F.instance_norm),
    "log softmax": lambda x: x.log_softmax(-1),
    "a function that has no rule": lambda x: torch.special.erfcx(x),
    "a loss, which has no rule": lambda x: F.mse_loss(x, WEIGHTS[0].expand_as(x), reduction="none"),
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("name", CALLS)
def test_image_and_constants_add_up_to_the_score(name):
    model = vit(read=lambda tokens: CALLS[name](tokens)[:, 0])
    found = explain(model, IMAGES, "evidence", target=2)
    assert (found.conservation - 1).abs().max() < 1e-9
    with torch.no_grad():
        assert torch.equal(found.logits, model(IMAGES))


@pytest.mark.parametrize(
    ("function", "slope"), [(F.gelu, 0.5), (F.silu, 0.5), (F.hardswish, 0.5), (torch.tanh, 1), (torch.sin, 1)]
)
def test_a_gate_at_0_is_the_slope_there(function, slope):
    """If an input is 0, the output of the function cannot be divided by it."""
    kept = []
    explain(vit(read=lambda tokens: (kept.append(tokens.detach().clone()), tokens[:, 0])[1]), IMAGES)
    found, wanted = (
        explain(vit(read=lambda tokens, by=by: by(tokens - kept[-1])[:, 0]), IMAGES, "grad_rollout", target=2)
        for by in (function, lambda x: slope * x)
    )
    assert wanted.maps.sum() > 0
    assert torch.allclose(found.maps, wanted.maps, rtol=1e-6, atol=1e-9)


LINEAR = {
    "tiles of a line": (nn.Conv1d(4, 6, 3, 3), (2, 4, 12)),
    "tiles of a picture": (nn.Conv2d(4, 6, (2, 3), (2, 3)), (2, 4, 8, 9)),
    "tiles of a clip": (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 3)), (2, 4, 3, 4, 6)),
    "tiles that leave out a border": (nn.Conv2d(4, 6, 3, 3), (2, 4, 8, 8)),
    "tiles in groups": (nn.Conv2d(4, 6, 2, 2, groups=2), (2, 4, 6, 6)),
    "tiles with holes": (nn.Conv2d(4, 6, 2, 2, dilation=2), (2, 4, 6, 6)),
    "windows that overlap": (nn.Conv2d(4, 6, 3, 2, padding=1), (2, 4, 8, 8)),
    "a layer": (nn.Linear(4, 6), (2, 5, 4)),
    "the middle of a layer": (lambda x: F.linear(x, WEIGHTS[:, :4])[..., 1:3], (2, 5, 4)),
    "the end of a product": (lambda x: (x @ WEIGHTS[:, :6])[..., 4:], (2, 5, 4)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_gradient_of_what_is_linear_is_that_of_autograd(name):
    call, shape = LINEAR[name]
    module = call.double() if isinstance(call, nn.Module) else nn.Identity()
    image, tape = torch.randn(shape, dtype=torch.float64), Tape(module, network="linearised")
    recorder = Recorder(tape)
    with torch.no_grad(), recorder.recording():
        recorder.begin(image)
        output = call(image)
    start = torch.randn_like(output)
    found = gradients(tape, {recorder.get(output): start}, (), whole=True).arrived[tape.image]
    leaf = image.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(call(leaf), leaf, start)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_channels_at_the_ends_that_are_0_are_left_out():
    for some in (slice(2, 4), slice(4), slice(3, None), slice(0)):
        g, matrix = torch.zeros(3, 5, 7), torch.randn(7, 2)
        g[..., some] = torch.randn(3, 5, 7)[..., some]
        assert torch.allclose(across(g, matrix), g @ matrix)
    g[1, 2, 6] = 1  # where the first token has a 0
    assert torch.equal(across(g, matrix)[1, 2], matrix[6])


def test_what_is_not_linearized_is_said():
    model = vit(read=lambda tokens: tokens.logcumsumexp(1)[:, 0])
    for method in ("evidence", "grad_rollout"):
        with pytest.raises(VitxError, match=r"reached logcumsumexp, in .*no rule takes it through") as error:
            explain(model, IMAGES, method)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_family_is_complete(name):
    family = models.FAMILIES[name]
    target = 2 if family.classes else lambda output: output[:, 2]
    images = family.images(dtype=torch.float64)
    model = models.built(name, torch.float64)
    asked = {"evidence": {}, "grad_rollout": {}, "rollout": {}}
    found = explain_methods(model, images, asked, target=target)
    assert (found["evidence"].conservation - 1).abs().max() < 1e-6
    assert found["evidence"].signed.shape == (2, *family.grid)
    plain = explain(model, images, target=target).logits
    assert torch.allclose(found["evidence"].logits, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_complete(kind):
    build, size, grid = KINDS[kind]
    if kind == "ConViT" and Version(timm.__version__) < Version("1.0.20"):
        pytest.skip("an older ConViT makes tensors of single precision")
    images = torch.randn(1, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = explain(build().double().eval(), images, "evidence", target=1)
    assert (found.conservation - 1).abs().max() < 1e-6
    assert grid is None or tuple(found.maps.shape[1:]) == grid
    assert found.signed.flatten(1).std(1) > 0 or not found.logits.any()


@pytest.mark.parametrize("name", ["deit", "deit3", "siglip", "average pooling", "eva02", "beit", "hybrid"])
def test_the_network_written_out_is_complete(name):
    """The image and the parameters that are added sum to the score in the oracle's own network."""
    model = visible.visible_twin(models.built(name, torch.float64))
    images = models.FAMILIES[name].images(dtype=torch.float64).requires_grad_()
    with torch.enable_grad(), visible.softmaxes(constant=True), visible.Linearized():
        score = model(images)[:, 2].sum()
    added = [
        parameter
        for path, parameter in model.named_parameters()
        if path.rsplit(".", 1)[-1] in ("bias", "cls_token", "pos_embed", "reg_token", "q_bias", "v_bias")
        and "relative" not in path
        and "latent" not in path
    ]
    gradients = torch.autograd.grad(score, [images, *added], allow_unused=True)
    pairs = zip([images, *added], gradients, strict=True)
    parts = [(value * gradient).sum() for value, gradient in pairs if gradient is not None]
    assert sum(parts).item() == pytest.approx(score.item(), rel=1e-6)
