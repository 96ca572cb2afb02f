"""What is known of the tensors of a pass."""

import pytest
import torch
from torch import nn

from vitx.tape.tape import Tape
from vitx.tape.tensors import Tensors


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("mask", torch.eye(3))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def tensors(model):
    return Tensors(model)


def test_what_is_known_goes_with_the_tensor(model, tensors):
    value = Tape(model).value((2,))
    tensor, factor = torch.zeros(2), torch.ones(2)
    tensors.bind(tensor, value, [(factor, None)])
    assert tensors.get(tensor).value is value
    assert tensors.get(tensor).factors == [(factor, None)]
    assert tensors.get(factor) is None
    assert len(tensors._known) == 1
    del tensor
    assert not tensors._known


def test_the_live_ones_in_their_order(model, tensors):
    tape = Tape(model)
    first, second, other = torch.zeros(6), torch.zeros(3), torch.zeros(2)
    part = first[:2]
    tensors.of(other).fixed = True
    values = {}
    for tensor in (second, part, first):
        values[id(tensor)] = tape.value(tensor.shape)
        tensors.bind(tensor, values[id(tensor)])
    found = tensors.live([first, other, second, first])
    assert [id(tensor) for tensor, _ in found] == [id(first), id(second), id(first)]
    assert all(value is values[id(tensor)] for tensor, value in found)
    inside = tensors.live_in(first.untyped_storage()._cdata)
    assert [id(tensor) for tensor, _ in inside] == [id(part), id(first)]


def test_a_later_value_has_a_later_stamp(model, tensors):
    tape, tensor, other = Tape(model), torch.zeros(2), torch.zeros(2)
    tensors.bind(tensor, tape.value((2,)))
    tensors.bind(other, tape.value((2,)))
    assert tensors.get(tensor).stamp < tensors.get(other).stamp == tensors.stamp
    tensors.bind(tensor, tape.value((2,)))
    assert tensors.get(tensor).stamp == tensors.stamp


def test_buffers_are_fixed_and_weights_are_learned(model, tensors):
    made = torch.zeros(3)
    assert tensors.is_fixed(model.mask)
    assert tensors.is_fixed(model.mask.T)
    assert not tensors.is_fixed(model.layer.weight)
    assert not tensors.is_fixed(made)
    tensors.of(made).fixed = True
    assert tensors.is_fixed(made)
    tensors.of(model.mask).fixed = False  # something learned was written there
    assert not tensors.is_fixed(model.mask)


def test_the_model_knows_its_own(model, tensors):
    for own in (model.mask[1:], model.layer.weight.T, model.layer.bias.detach()):
        assert tensors.is_of_model(own)
    assert not tensors.is_of_model(model.layer.weight.clone())
