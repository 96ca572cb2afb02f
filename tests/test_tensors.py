"""The facts recorded about the tensors of a pass, and the tensors that are kept."""

import gc

import pytest
import torch
from torch import nn

from vitx.tape.tape import Tape
from vitx.tape.tensors import Keeper, Tensors, _frozen, storage_of


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
    tensors.of(other).origin = "fixed"
    values = {}
    for tensor in (second, part, first):
        values[id(tensor)] = tape.value(tensor.shape)
        tensors.bind(tensor, values[id(tensor)])
    found = tensors.live([first, other, second, first])
    assert [id(tensor) for tensor, _ in found] == [id(first), id(second), id(first)]
    assert all(value is values[id(tensor)] for tensor, value in found)
    inside = tensors.live_in(first.untyped_storage()._cdata)
    assert [id(tensor) for tensor, _ in inside] == [id(part), id(first)]


def test_where_constants_come_from(model, tensors):
    made = torch.zeros(3)
    assert tensors.origin(model.mask) == tensors.origin(model.mask.T) == "fixed"
    assert tensors.origin(model.layer.weight) == tensors.origin(model.layer.weight.detach().T) == "learned"
    assert tensors.origin(nn.Parameter(made)) == tensors.origin(nn.Linear(3, 3).weight.T) == "learned"
    assert tensors.origin(made) == "given"
    tensors.of(made).origin = "fixed"
    assert tensors.origin(made) == "fixed"
    tensors.of(model.mask).origin = "learned"  # something learned was written there
    assert tensors.origin(model.mask) == "learned"


def test_weights_in_a_frozen_program_were_learned(model):
    frozen = torch.jit.freeze(torch.jit.trace(nn.Sequential(model.layer).eval(), torch.zeros(1, 3)))
    assert not [*frozen.parameters()]
    constants = [*_frozen(frozen)]
    assert [tuple(one.shape) for one in constants] == [(3, 3), (3,)]
    assert {Tensors(frozen).origin(one) for one in constants} == {"learned"}


def test_the_model_knows_its_own(model, tensors):
    for own in (model.mask[1:], model.layer.weight.T, model.layer.bias.detach()):
        assert tensors.is_of_model(own)
    assert not tensors.is_of_model(model.layer.weight.clone())


def test_storages_are_told_apart():
    one, other = torch.zeros(3), torch.zeros(3)
    assert storage_of(one) == storage_of(one[1:]) == storage_of(one.detach()) != storage_of(other)
    assert storage_of(nn.Parameter(one)) == storage_of(one)
    assert storage_of(one.to_sparse()) is None


def test_what_is_kept_stays_as_it_was():
    tensor, other = torch.arange(6.0).view(2, 3), torch.zeros(2)
    keeper = Keeper()
    kept = [keeper.keep(part) for part in (tensor, tensor[1], tensor.T, other)]
    keeper.preserve([tensor[0]])
    tensor.fill_(-1)
    assert kept[0].tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert kept[1].tensor.tolist() == [3, 4, 5]
    assert kept[2].tensor.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert kept[3].tensor.data_ptr() == other.data_ptr(), "nobody wrote there"


def test_nothing_is_copied_for_what_was_let_go():
    tensor = torch.zeros(3)
    keeper = Keeper()
    kept = keeper.keep(tensor)
    assert kept.tensor.data_ptr() == tensor.data_ptr()
    del kept
    gc.collect()
    keeper.preserve([tensor])
    again = keeper.keep(tensor)
    keeper.preserve([tensor])
    keeper.preserve([tensor])  # a second write needs no second copy
    copy = again.tensor
    tensor.fill_(1)
    keeper.preserve([tensor])
    assert again.tensor is copy
    assert copy.tolist() == [0, 0, 0]
