"""Of what a recorded step compares, which output and which labels count."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tests.steps import CLASSES, STEPS, Net, batch, bce_of_logits, ce, recorded


class Losing(Net):
    """A model that computes its own loss, as those of Hugging Face do."""

    def forward(self, images, labels=None):
        logits = super().forward(images)
        return {"loss": ce(logits.view(-1, CLASSES), labels.view(-1)), "logits": logits}


def test_a_loss_inside_of_the_model():
    b = batch(6)
    seen = recorded(lambda net, b: net(b["x"], labels=b["y"]), Losing(), b)
    assert seen.kind == "class"
    assert torch.equal(seen.labels(b), b["y"])


def test_of_a_loss_by_hand_the_term_of_no_may_come_first():
    def step(net, b):
        p = net(b["x"]).sigmoid()
        return ((1 - b["several"]) * (1 - p).log() + b["several"] * p.log()).nansum()

    b = batch(6)
    seen = recorded(step, Net(), b)
    assert seen.kind == "classes"
    torch.testing.assert_close(seen.labels(b), b["several"], equal_nan=True)


def test_levels_of_a_grade_are_no_classes():
    """Ordinal labels say whether the class is above 0, and above 1."""

    def step(net, b):
        levels = (b["y"][:, None] > torch.arange(CLASSES - 1)).float()
        return bce_of_logits(net(b["x"]), levels)

    seen = recorded(step, Net(CLASSES - 1), batch(6))
    assert seen.kind == "classes"
    assert seen.labels(batch(3)).tolist() == [[0, 0], [1, 0], [1, 1]]


class Heads(Net):
    """A model with two heads, and a copy of the first."""

    def __init__(self):
        super().__init__()
        self.aux, self.copy = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)

    def forward(self, images):
        return {"aux": self.aux(images.flatten(1)), "logits": super().forward(images)}


def auxiliary_first(net, b):
    found = net(b["x"])
    return ce(found["aux"], b["y"]) + ce(found["logits"], b["y"])


def copy_first(net, b):
    return ce(net.copy(b["x"].flatten(1)), b["y"]) + ce(net(b["x"])["logits"], b["y"])


def numbers_first(net, b):
    logits = net(b["x"])["logits"]
    return F.mse_loss(logits, b["several"]) + ce(logits, b["y"])


@pytest.mark.parametrize("step", [auxiliary_first, copy_first, numbers_first])
def test_of_several_comparisons_that_of_the_classes_that_forward_returns_counts(step):
    net, b = Heads(), batch(6)
    seen = recorded(step, net, b)
    assert seen.kind == "class"
    assert torch.equal(seen.labels(b), b["y"])
    assert torch.equal(seen.run(net, b), net(b["x"])["logits"])
    assert seen.note == "of 2 comparisons in step, forward's counts: give forward_fn or labels for another"


def test_outside_of_forward_the_first_comparison_counts():
    net, b = Heads(), batch(6)
    seen = recorded(lambda net, b: [ce(net.copy(b["x"].flatten(1)), b["y"]) for _ in range(3)], net, b)
    assert seen.note == "of 3 comparisons in step, the first counts: give forward_fn or labels for another"
    assert recorded(STEPS["cross entropy"][0], Net(), b).note == ""


@pytest.mark.parametrize("average", [ModelEmaV3, AveragedModel])
def test_averaged_weights_of_a_model_are_not_its_own(average):
    net, b = Net(), batch(6)
    net.average = average(Net())
    seen = recorded(lambda net, b: ce(net.average.module(b["x"]), b["y"]), net, b)
    assert seen.kind == "class"
    assert seen.lacks(net, {"x"}) == ["average.module"]


def thresholds(net, b):
    """The loss of CORN: whether the grade is above 0, and for those, whether it is above 1, and so on."""
    logits, total = net(b["x"]), 0
    for k in range(CLASSES - 1):
        among = b["y"] > k - 1
        total = total + bce_of_logits(logits[among, k], (b["y"][among] > k).float())
    return total


def two_tasks(net, b):
    logits = net(b["x"])
    return ce(logits[:, :2], (b["y"] > 0).long()) + F.mse_loss(logits[:, 2], b["grade"])


@pytest.mark.parametrize(("step", "part"), [(thresholds, 0), (two_tasks, slice(2))])
def test_of_parts_that_are_compared_one_by_one_the_first_counts(step, part):
    net, b = Net(), batch(6)
    seen = recorded(step, net, b)
    assert seen.kind == "class"
    assert torch.equal(seen.labels(b), b["y"].clamp(max=1))
    assert torch.equal(seen.run(net, b), net(b["x"])[:, part])
    assert seen.note == "of 2 comparisons in step, forward's counts: give forward_fn or labels for another"


def weighed(net, b):
    return (net(b["x"]).softmax(1) * b["grade"][:, None]).argmax(1) == b["y"]


def looked_up(net, b):
    return (net(b["x"])[range(len(b["y"])), b["y"]] - b["grade"]) ** 2


@pytest.mark.parametrize(
    ("step", "kind", "labels"), [(weighed, "class", "y"), (looked_up, "numbers", "grade")]
)
def test_what_an_output_is_made_of_is_no_truth(step, kind, labels):
    b = batch(6)
    seen = recorded(step, Net(), b)
    assert seen.kind == kind
    assert torch.equal(seen.labels(b), b[labels])
