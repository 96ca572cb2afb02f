"""Writes into a storage, as seen by other tensors in it."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.modules import Around
from vitx import explain
from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape
from vitx.tape.tensors import geometry
from vitx.tape.versions import _overlap
from vitx.tape.walk import walk

VIEWS = {
    "all": lambda x: x.view(-1),
    "turned": lambda x: x.T,
    "the first rows": lambda x: x[:2],
    "some rows": lambda x: x[1:3],
    "a column": lambda x: x[:, 1],
    "a diagonal": lambda x: x.diagonal(),
    "expanded": lambda x: x[:, None].expand(4, 2, 3),
    "an overlap": lambda x: x.view(-1).unfold(0, 6, 2),
    "one number": lambda x: x[2, 1],
    "laid otherwise": lambda x: x.as_strided((2, 3), (1, 4), 2),
}
WRITES = {
    "all": lambda x: x.mul_(3),
    "a row": lambda x: x[1].mul_(3),
    "a column": lambda x: x[:, 1].mul_(3),
    "two parts": lambda x: (x[0].mul_(3), x[2:].mul_(5)),
    "turned": lambda x: x.T.mul_(3),
}


def test_real_numbers_that_were_written_as_complex_ones_are_refused():
    tape = Tape(nn.Identity())
    recorder, image = Recorder(tape), torch.randn(4, 2)
    with torch.no_grad(), recorder.recording():
        recorder.begin(image)
        whole = torch.view_as_complex(image * 2)
        part = torch.view_as_real(whole)
        whole[1] *= 3
        out = part * 1
    step = recorder.get(out).made_by.inputs[0].made_by
    assert step.name == "view"
    assert step.relevance is None


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_sees_what_was_written(view, write, between):
    """Its gradient is that of autograd, whether or not another value is recorded before the write."""

    def function(x):
        whole = x * 2
        part = VIEWS[view](whole)
        other = x + 1 if between else 0
        WRITES[write](whole)
        return part * 1, other

    tape = Tape(nn.Identity(), network="linearised")
    recorder, image = Recorder(tape), torch.randn(4, 3)
    with torch.no_grad(), recorder.recording():
        recorder.begin(image)
        out, _ = function(image)
    gradient = torch.randn(out.shape)
    found = walk(
        tape,
        {recorder.get(out): gradient},
        lambda step, arrived: zip(step.sources, step.gradient(arrived), strict=True),
    )
    leaf = image.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(function(leaf)[0], leaf, gradient)
    torch.testing.assert_close(found.arrived[tape.image], wanted)


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (lambda x: x[:, 0], lambda x: x[:, 1:], False),
        (lambda x: x[:, 0], lambda x: x[2], True),
        (lambda x: x[:2], lambda x: x[2:], False),
        (lambda x: x[::2], lambda x: x[1::2], False),
        (lambda x: x[::2], lambda x: x.T[3], True),
        (lambda x: x, lambda x: x[4, 11], True),
    ],
)
def test_overlap(first, second, common):
    matrix = torch.zeros(5, 12)
    geometries = geometry(first(matrix)), geometry(second(matrix))
    assert _overlap(*geometries, 60) == _overlap(*geometries[::-1], 60) == common


def sliced(x):
    whole = x.new_zeros(*x.shape[:2], 34, 34)
    whole[..., 1:-1, 1:-1] = x
    return whole


def copied(x):
    whole = torch.empty(*x.shape[:2], 34, 34).zero_()
    whole[..., 1:-1, 1:-1].copy_(x)
    return whole


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
@pytest.mark.parametrize("write", [sliced, copied])
def test_a_picture_that_is_written_into_zeros_is_padded(write, method):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 3, 3)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()

    images = torch.randn(2, 3, 32, 32)
    padded = (nn.Sequential(Around(pad), stem, vit).eval() for pad in (write, lambda x: F.pad(x, [1] * 4)))
    found, wanted = (explain(model, images, method, target=1).maps for model in padded)
    torch.testing.assert_close(found, wanted)


def by_heads(scores):
    weights = torch.empty_like(scores)
    for head in range(scores.shape[1]):
        weights[:, head] = scores[:, head].softmax(-1)
    return weights


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_a_softmax_may_be_written_head_by_head(method):
    class Net(nn.Module):
        def __init__(self, softmax):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
            self.qkv, self.softmax = nn.ModuleList(nn.Linear(24, 72) for _ in range(2)), softmax

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            for qkv in self.qkv:
                q, k, v = qkv(x).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4).unbind(0)
                x = x + (self.softmax(q @ k.mT) @ v).transpose(1, 2).flatten(2)
            return self.head(x.mean(1))

    images = torch.randn(2, 3, 16, 16)
    both = by_heads, lambda scores: scores.softmax(-1)
    found, wanted = (explain(Net(softmax).eval(), images, method, target=1).maps for softmax in both)
    torch.testing.assert_close(found, wanted)
