"""A recorded step: what it shows of its batch, and how it is run again on another one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.steps import CLASSES, STEPS, Net, batch, bce, ce, recorded, sigmoid_by_hand, sigmoid_in_the_step
from vitx.watch.calling import is_compiled
from vitx.watch.observed import observed
from vitx.watch.step import StepRecorder


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(("step", "kind", "labels", "leaves"), STEPS.values(), ids=STEPS)
def test_what_a_step_shows(step, kind, labels, leaves, mode):
    net = Net().eval()
    with mode():
        seen = recorded(step, net, batch(6))
    assert seen.kind == kind
    assert seen.output.leaves == leaves
    other = batch(4, seed=1)
    if kind == "class" and labels is None:
        assert torch.equal(seen.labels(other).round(), F.one_hot(other["y"], CLASSES))
    elif labels is not None:
        torch.testing.assert_close(seen.labels(other), other[labels], equal_nan=True)


@pytest.mark.parametrize("name", [name for name, (_, kind, *_) in STEPS.items() if kind])
def test_runs_anew_on_another_batch(name):
    """The oracle records the same step on the other batch, and reads its output there."""
    step, net, other = STEPS[name][0], Net().eval(), batch(4, seed=1)
    seen = recorded(step, net, batch(6))
    compared = []

    class Reading(StepRecorder):
        def _compare(self, name, args):
            before = len(self.comparisons)
            super()._compare(name, args)
            made = [
                arg
                for arg in args
                if isinstance(arg, torch.Tensor) and getattr(self._values.get(arg), "of_model", False)
            ]
            compared.extend(made[:1] * (len(self.comparisons) - before))

    given = {name: leaf.clone() for name, leaf in other.items()}
    with torch.no_grad(), Reading(net, other).recording():
        step(net, other)
    found = seen.run(net, given)
    assert len(found) == 4
    assert all(torch.equal(leaf, other[name]) for name, leaf in given.items() if name != "several")
    expected = compared[0]
    if name == "several classes, some unknown":
        found = found[~other["several"].isnan()]
    forms = [
        found,
        found.softmax(-1),
        found.log_softmax(-1),
        found.argmax(-1),
        found.sigmoid(),
        F.logsigmoid(found),
        found > 0,
    ]
    assert any(
        form.shape == expected.shape and torch.allclose(form.to(expected.dtype), expected) for form in forms
    )


PROBABLE = {
    "a sigmoid in the model": (1, nn.Sigmoid(), lambda net, b: bce(net(b["x"])[:, 0], (b["y"] > 0).float())),
    "a sigmoid in the step": (1, nn.Identity(), sigmoid_in_the_step),
    "a sigmoid by hand": (1, nn.Identity(), sigmoid_by_hand),
    "a softmax in the model": (CLASSES, nn.Softmax(1), lambda net, b: F.nll_loss(net(b["x"]).log(), b["y"])),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(("outputs", "last", "step"), PROBABLE.values(), ids=PROBABLE)
def test_probabilities_become_logits(outputs, last, step, mode):
    net = Net(outputs, last).eval()
    with mode():
        seen = recorded(step, net, batch(6))
    assert seen.kind == "class"
    found, expected = seen.run(net, batch(4, 1)), Net(outputs).eval()(batch(4, 1)["x"])
    if seen.logits is None and not isinstance(last, nn.Identity):  # explanations begin before `last`
        found = torch.logit(found) if outputs == 1 else found.log()
    if outputs > 1:
        found, expected = found.log_softmax(1), expected.log_softmax(1)
    assert torch.allclose(found.flatten(), expected.flatten(), atol=1e-5)


def test_a_sigmoid_in_the_model_makes_shares():
    step = STEPS["a number"][0]
    assert recorded(step, Net(1, nn.Sigmoid()), batch(6)).kind == "shares"
    assert recorded(step, Net(1, nn.Tanh()), batch(6)).kind == "numbers"


class Holding(Net):
    """A model with tensors of its own, which a step uses outside of the calls of modules."""

    def __init__(self):
        super().__init__()
        self.scale, self.wide = nn.Parameter(torch.ones(())), nn.Parameter(torch.rand(CLASSES, CLASSES))
        self.register_buffer("center", torch.zeros(CLASSES))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.prototypes, self.neighbors = torch.rand(CLASSES, CLASSES), torch.eye(CLASSES).to_sparse()


def centered_in_place(net, b):
    net.center.mul_(0.5).add_(0.25)
    return net(b["x"]) - net.center


HOLDING = {
    "the exponential of a scale": lambda net, b: net.scale.exp() * net(b["x"]),
    "normalized weights": lambda net, b: net(b["x"]) @ F.normalize(net.wide).T,
    "a buffer": lambda net, b: net(b["x"]) - net.center,
    "a buffer written in place": centered_in_place,
    "an attribute": lambda net, b: net(b["x"]) @ net.prototypes.T,
}


@pytest.mark.parametrize("scores", HOLDING.values(), ids=HOLDING)
def test_takes_what_the_module_holds_at_the_moment(scores):
    net, b = Holding(), batch(6)
    with torch.no_grad():
        seen = recorded(lambda net, b: ce(scores(net, b), net.order[b["y"]]), net, b)
        net.scale.add_(1)
        net.wide.mul_(-2)
        net.center, net.prototypes = net.center + 3, net.prototypes.flip(0)
        before, found = net.center.clone(), seen.run(net, b)
        assert torch.equal(net.center, before)
        assert torch.allclose(found, scores(net, b))
    assert torch.equal(seen.labels(b), net.order[b["y"]])


def test_draws_anew_for_another_batch():
    def step(net, b):
        return ce(net(b["x"] * (torch.rand(len(b["x"]), 1, 2, 2) > 0.5)), b["y"])

    net, other = Net().eval(), batch(4, 1)
    seen = recorded(step, net, batch(6))
    torch.manual_seed(3)
    found = seen.run(net, other)
    torch.manual_seed(3)
    assert torch.allclose(found, net(other["x"] * (torch.rand(4, 1, 2, 2) > 0.5)))


def test_a_training_step_that_draws_is_not_run_anew():
    def mixed(net, b):
        share, order = torch.rand(()), torch.randperm(len(b["x"]))
        return ce(net(b["x"].lerp(b["x"][order], share)), b["y"])

    assert recorded(mixed, Net().train(), batch(6)) is None
    assert recorded(mixed, Net().eval(), batch(6)) is not None


@pytest.mark.parametrize(
    "form", [dict, lambda b: tuple(b.values()), lambda b: SimpleNamespace(**b), lambda b: {"in": b}]
)
def test_the_form_of_a_batch_does_not_matter(form):
    b = batch(6)
    seen = recorded(lambda net, _: ce(net(b["x"]), b["y"]), Net(), form(b))
    assert seen.kind == "class"
    assert seen.images[0].rpartition(".")[2] in ("x", "0")


def test_changes_nothing():
    net, b = Net().train(), batch(6)
    before, state = {name: leaf.clone() for name, leaf in b.items()}, torch.get_rng_state()
    plain = ce(net(b["x"]), b["y"])
    recorder = StepRecorder(net, b)
    with recorder.recording():
        loss = ce(net(b["x"]), b["y"])
    assert torch.equal(plain, loss)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(leaf, before[name]) for name, leaf in b.items() if name != "several")
    loss.backward()
    assert net.head.weight.grad is not None
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_hooks_with_kwargs
    assert not hooks._global_forward_pre_hooks


def test_a_step_that_fails_stays_its_own_error():
    b = batch(6)
    recorder = StepRecorder(Net(), b)
    with pytest.raises(ZeroDivisionError), recorder.recording():
        _ = 1 / 0
    assert observed(recorder, "step") is None


def test_a_recording_that_fails_lets_the_step_go_on(monkeypatch):
    monkeypatch.setattr(StepRecorder, "_add", lambda *_: 1 / 0)
    net, b = Net(), batch(6)
    recorder = StepRecorder(net, b)
    with recorder.recording():
        loss = ce(net(b["x"]), b["y"])
    assert torch.equal(loss, ce(net(b["x"]), b["y"]))
    assert isinstance(recorder.error, ZeroDivisionError)
    assert observed(recorder, "step") is None


def test_compiled_parts_are_known():
    assert not is_compiled(Net())
    assert is_compiled(torch.compile(Net()))
    inside = Net()
    inside.last.compile()
    assert is_compiled(inside)
