"""The module and the line of a model in which a call was made."""

import torch
from torch import nn
from torch.nn import functional as F

from vitx.tape.recorder import Recorder
from vitx.tape.tape import Tape, location_of


class Inner(nn.Module):
    def forward(self, x):
        return F.gelu(x + 1)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), Inner())

    def forward(self, x):
        x = self.layers(x)
        return helper(x)


def helper(x):
    return x.cumsum(1)


def recorded(model, named=True):
    tape = Tape(model, named=named)
    recorder = Recorder(tape)
    image = torch.randn(2, 4)
    with torch.no_grad(), recorder.recording():
        recorder.begin(image)
        model(image)
    return tape


def test_each_step_knows_its_module_and_its_line():
    places = {step.name: step.location for step in recorded(Outer()).steps}
    assert places["linear"][0] == "layers.0"
    assert places["add"] == ("layers.1", "return F.gelu(x + 1)")
    assert places["gelu"] == ("layers.1", "return F.gelu(x + 1)")
    assert places["cumsum"] == ("Outer", "return x.cumsum(1)")


def test_places_are_not_looked_up_where_nobody_asks():
    assert all(step.location is None for step in recorded(Outer(), named=False).steps)


def test_what_has_no_rule_knows_its_place_anyway():
    class Unknown(nn.Module):
        def forward(self, x):
            return torch.linalg.pinv(x)

    (step,) = recorded(Unknown(), named=False).steps
    assert step.relevance is None
    assert step.location == ("Unknown", "return torch.linalg.pinv(x)")


def test_outside_of_the_model_there_is_none():
    assert location_of(Outer()) is None
