"""A recorded step: what it shows of its batch, and how it is run again on another one."""

from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from vitx.watch.calling import is_compiled
from vitx.watch.observed import observed
from vitx.watch.step import StepRecorder

CLASSES = 3
ce, bce, bce_of_logits = F.cross_entropy, F.binary_cross_entropy, F.binary_cross_entropy_with_logits


class Net(nn.Module):
    """A model of images and optional ages, which may end in a softmax or a sigmoid."""

    def __init__(self, outputs=CLASSES, last=None):
        super().__init__()
        torch.manual_seed(1)
        self.head, self.age, self.last = nn.Linear(12, outputs), nn.Linear(1, outputs), last or nn.Identity()

    def forward(self, images, age=None):
        found = self.head(images.flatten(1))
        return self.last(found if age is None else found + self.age(age[:, None]))


class Losing(Net):
    """A model that computes its own loss, as those of Hugging Face do."""

    def forward(self, images, labels=None):
        logits = super().forward(images)
        return {"loss": ce(logits.view(-1, CLASSES), labels.view(-1)), "logits": logits}


def batch(count, seed=0):
    """Return images, ages, classes, several classes (some unknown), grades, and other images."""
    generator = torch.Generator().manual_seed(seed)
    several = torch.randint(2, (count, CLASSES), generator=generator).float()
    several[0, 0] = float("nan")
    return {
        "x": torch.rand(count, 3, 2, 2, generator=generator),
        "age": torch.rand(count, generator=generator),
        "y": torch.arange(count) % CLASSES,
        "several": several,
        "grade": torch.rand(count, generator=generator),
        "other": torch.rand(count, 3, 2, 2, generator=generator),
    }


def focal(net, b):
    log_p = net(b["x"]).log_softmax(-1).gather(1, b["y"][:, None])
    return (-((1 - log_p.exp()) ** 2) * log_p).mean()


def known_only(net, b):
    known = ~b["several"].isnan()
    return bce_of_logits(net(b["x"])[known], b["several"][known])


def log_p(net, b):
    return -net(b["x"]).softmax(1).log()[range(len(b["y"])), b["y"]].mean()


def several_by_hand(net, b):
    return (b["several"] * F.logsigmoid(net(b["x"]))).nansum()


def several_of_p(net, b):
    p = net(b["x"]).sigmoid()
    return -(b["several"] * (p + 1e-8).log() + (1 - b["several"]) * (1 - p + 1e-8).log()).nansum()


def sigmoid_in_the_step(net, b):
    return bce(net(b["x"]).sigmoid()[:, 0], (b["y"] > 0).float())


def share_in_the_step(net, b):
    return F.mse_loss(net(b["x"])[:, 0].sigmoid(), b["grade"])


def sigmoid_by_hand(net, b):
    return bce(1 / (1 + (-net(b["x"])[:, 0]).exp()), (b["y"] > 0).float())


def in_place(net, b):
    images = b["x"].clone()
    images.sub_(0.5)
    images[:, 0].mul_(2.0)
    return ce(net(images), b["y"])


def two_parts(net, b):
    features = net.head(b["x"].flatten(1))
    return ce(net.last(features), b["y"])


def flips(b, dim):
    return torch.stack([b["x"], b["x"].flip(-1)], dim)


# A step, the kind of its output, the labels that it is compared with (None for one-hot labels or none), and
# the entries of the batch that the output depends on.
STEPS = {
    "cross entropy": (lambda net, b: ce(net(b["x"]), b["y"]), "class", "y", ["x"]),
    "smoothed": (lambda net, b: ce(net(b["x"]), b["y"], label_smoothing=0.1), "class", "y", ["x"]),
    "labels from 1": (lambda net, b: ce(net(b["x"]), b["y"] + 1 - 1), "class", "y", ["x"]),
    "focal, by hand": (focal, "class", "y", ["x"]),
    "log p by hand": (log_p, "class", "y", ["x"]),
    "one-hot times log p": (
        lambda net, b: -(F.one_hot(b["y"], CLASSES) * net(b["x"]).log_softmax(1)).sum(1).mean(),
        *("class", None, ["x"]),
    ),
    "accuracy alone": (lambda net, b: (net(b["x"]).argmax(1) == b["y"]).float().mean(), "class", "y", ["x"]),
    "binary cross entropy of one class": (
        lambda net, b: bce_of_logits(net(b["x"]), F.one_hot(b["y"], CLASSES).float()),
        *("class", None, ["x"]),
    ),
    "smoothed binary cross entropy of one class": (
        lambda net, b: bce_of_logits(net(b["x"]), F.one_hot(b["y"], CLASSES) * 0.9 + 0.05),
        *("class", None, ["x"]),
    ),
    "several classes, some unknown": (known_only, "classes", "several", ["x"]),
    "unknown ones filled": (
        lambda net, b: bce_of_logits(net(b["x"]), b["several"].nan_to_num(0.0)),
        *("classes", "several", ["x"]),
    ),
    "several by hand": (several_by_hand, "classes", "several", ["x"]),
    "several by hand, log p": (several_of_p, "classes", "several", ["x"]),
    "above 0": (lambda net, b: ((net(b["x"]) > 0) == b["several"]).sum(), "classes", "several", ["x"]),
    "a number": (lambda net, b: F.mse_loss(net(b["x"])[:, 0], b["grade"]), "numbers", "grade", ["x"]),
    "a number, by hand": (lambda net, b: (net(b["x"])[:, 0] - b["grade"]).abs(), "numbers", "grade", ["x"]),
    "huber": (lambda net, b: F.huber_loss(net(b["x"])[:, 0], b["grade"]), "numbers", "grade", ["x"]),
    "a share": (share_in_the_step, "shares", "grade", ["x"]),
    "numbers that are one-hot": (
        lambda net, b: F.mse_loss(net(b["x"]), F.one_hot(b["y"], CLASSES).float()),
        *("class", None, ["x"]),
    ),
    "an age besides": (lambda net, b: ce(net(b["x"], b["age"]), b["y"]), "class", "y", ["age", "x"]),
    "an age by name, scaled": (
        lambda net, b: ce(net(b["x"], age=b["age"] / 100), b["y"]),
        *("class", "y", ["age", "x"]),
    ),
    "normalized in the step": (
        lambda net, b: ce(net((b["x"] - 0.5) / 0.25), b["y"]),
        *("class", "y", ["x"]),
    ),
    "two images": (lambda net, b: ce(net(b["x"]) - net(b["other"]), b["y"]), "class", "y", ["other", "x"]),
    "written in place": (in_place, "class", "y", ["x"]),
    "two parts": (two_parts, "class", "y", ["x"]),
    "views folded into the batch": (
        lambda net, b: ce(net(flips(b, 1).flatten(0, 1)).unflatten(0, (len(b["x"]), 2)).mean(1), b["y"]),
        *("class", "y", ["x"]),
    ),
    "flips joined": (
        lambda net, b: ce(sum(net(flips(b, 0).flatten(0, 1)).chunk(2)), b["y"]),
        *("class", "y", ["x"]),
    ),
    "a part of a joined batch": (
        lambda net, b: ce(net(torch.cat([b["x"], b["other"]]))[: len(b["x"])], b["y"]),
        *("class", "y", ["other", "x"]),
    ),
    "no labels": (lambda net, b: net(b["x"]).sum(), None, None, ["x"]),
}  # fmt: skip


def recorded(step, net, b):
    recorder = StepRecorder(net, b)
    with recorder.recording():
        step(net, b)
    return observed(recorder, "step")


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
