"""Steps of a training on small batches: how they compare what a model returns with labels."""

import torch
from torch import nn
from torch.nn import functional as F

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


def views_folded(net, b):
    return ce(net(flips(b, 1).flatten(0, 1)).unflatten(0, (len(b["x"]), 2)).mean(1), b["y"])


def joined(net, b):
    return ce(net(torch.cat([b["x"], b["other"]]))[: len(b["x"])], b["y"])


def one_hot(b):
    return F.one_hot(b["y"], CLASSES)


# The kind of an output, and the labels that it is compared with (None for one-hot labels or none), of steps.
BY_KIND = {
    ("class", "y"): {
        "cross entropy": lambda net, b: ce(net(b["x"]), b["y"]),
        "smoothed": lambda net, b: ce(net(b["x"]), b["y"], label_smoothing=0.1),
        "labels from 1": lambda net, b: ce(net(b["x"]), b["y"] + 1 - 1),
        "focal, by hand": focal,
        "log p by hand": log_p,
        "accuracy alone": lambda net, b: (net(b["x"]).argmax(1) == b["y"]).float().mean(),
        "an age besides": lambda net, b: ce(net(b["x"], b["age"]), b["y"]),
        "an age by name, scaled": lambda net, b: ce(net(b["x"], age=b["age"] / 100), b["y"]),
        "normalized in the step": lambda net, b: ce(net((b["x"] - 0.5) / 0.25), b["y"]),
        "two images": lambda net, b: ce(net(b["x"]) - net(b["other"]), b["y"]),
        "written in place": in_place,
        "two parts": two_parts,
        "views folded into the batch": views_folded,
        "flips joined": lambda net, b: ce(sum(net(flips(b, 0).flatten(0, 1)).chunk(2)), b["y"]),
        "a part of a joined batch": joined,
    },
    ("class", None): {
        "one-hot times log p": lambda net, b: -(one_hot(b) * net(b["x"]).log_softmax(1)).sum(1).mean(),
        "binary cross entropy of one class": lambda net, b: bce_of_logits(net(b["x"]), one_hot(b).float()),
        "smoothed binary cross entropy of one class": lambda net, b: bce_of_logits(
            net(b["x"]), one_hot(b) * 0.9 + 0.05
        ),
        "numbers that are one-hot": lambda net, b: F.mse_loss(net(b["x"]), one_hot(b).float()),
    },
    ("classes", "several"): {
        "several classes, some unknown": known_only,
        "unknown ones filled": lambda net, b: bce_of_logits(net(b["x"]), b["several"].nan_to_num(0.0)),
        "several by hand": several_by_hand,
        "several by hand, log p": several_of_p,
        "above 0": lambda net, b: ((net(b["x"]) > 0) == b["several"]).sum(),
    },
    ("numbers", "grade"): {
        "a number": lambda net, b: F.mse_loss(net(b["x"])[:, 0], b["grade"]),
        "a number, by hand": lambda net, b: (net(b["x"])[:, 0] - b["grade"]).abs(),
        "huber": lambda net, b: F.huber_loss(net(b["x"])[:, 0], b["grade"]),
    },
    ("shares", "grade"): {"a share": share_in_the_step},
    (None, None): {"no labels": lambda net, b: net(b["x"]).sum()},
}
# What the output depends on besides "x".
BESIDE = {"an age besides": "age", "an age by name, scaled": "age"}
BESIDE |= {"two images": "other", "a part of a joined batch": "other"}
# A step, the kind of its output, the labels, and the entries of the batch that the output depends on.
STEPS = {
    name: (step, kind, labels, sorted({"x", BESIDE.get(name, "x")}))
    for (kind, labels), steps in BY_KIND.items()
    for name, step in steps.items()
}


def recorded(step, net, b):
    recorder = StepRecorder(net, b)
    with recorder.recording():
        step(net, b)
    return observed(recorder, "step")
