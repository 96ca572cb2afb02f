"""What is shown of a model by the kind of its output: classes, numbers, shares, features."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from tests.lightning_models import SmallClassifier, fit, samples
from tests.played_runs import open_run
from vitx.attribution import title_of
from vitx.callbacks import RolloutCallback
from vitx.pictures import render
from vitx.pictures.captions import captions_of

GRID = np.zeros((4, 4, 3), np.uint8)


class ManyLabels(SmallClassifier):
    def training_step(self, batch, _):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, *_):
        pass


class Regression(ManyLabels):
    def forward(self, images):
        return super().forward(images)[:, 0]

    def training_step(self, batch, _):
        return F.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("module", "labels", "target"),
    [
        (ManyLabels, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]), lambda x: x[:, 2]),
        (ManyLabels, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]), "predicted"),
        (Regression, torch.tensor([0.5, 1.5, -0.5, 2.0]), lambda x: x),
    ],
    ids=["a class of several", "the likeliest of several", "a number"],
)
def test_several_classes_and_numbers(module, labels, target, monkeypatch):
    seen = []
    monkeypatch.setattr(render, "grid", lambda columns, captions, **_: seen.append(captions) or GRID)
    data = DataLoader(TensorDataset(samples(4).tensors[0], labels), batch_size=4)
    fit(RolloutCallback(target=target, on_error="raise"), module=module, data=(data, data), max_epochs=1)
    assert [caption.label for caption in seen[0]] == (
        ["0.50", "1.50", "-0.50", "2.00"] if module is Regression else ["0 + 1", "none", "1 + 2", "0"]
    )


class Shares(Regression):
    """A regression of shares with binary cross entropy."""

    def training_step(self, batch, _):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    validation_step = training_step


def test_shares_are_captioned_as_shares(monkeypatch):
    said = []
    monkeypatch.setattr(render, "grid", lambda columns, captions, **_: said.append(captions) or GRID)
    images, module = samples(4).tensors[0], Shares()
    data = DataLoader(TensorDataset(images, torch.tensor([0.35, 0.5, 1.0, 0.05])), batch_size=4)
    shares = module.eval()(images).sigmoid().tolist()
    fit(RolloutCallback(on_error="raise"), module=module.train(), data=(data, data), max_epochs=1)
    truth = ["0.35", "0.50", "1.00", "0.05"]
    expected = [f"{share:.2f}, is {true}" for share, true in zip(shares, truth, strict=True)]
    assert [str(caption) for caption in said[0]] == expected


class Features(ManyLabels):
    """A backbone alone, whose training tells the callback nothing about its output."""

    def __init__(self):
        super().__init__()
        self.head, self.norm = nn.Identity(), nn.Identity()

    def training_step(self, batch, _):
        images = batch[0] if isinstance(batch, list) else batch
        return self(images).square().mean()


class Embeddings(Features):
    """Features that the validation step compares with nothing."""

    def validation_step(self, batch, _):
        return self(batch[0])


class Tokens(Features):
    def forward(self, images):
        return self.vit.forward_features(images)


class TwoNumbers(Features):
    def forward(self, images):
        return super().forward(images)[:, :2]


NAMED = samples(4)
NAMED.classes = ["cat", "dog", "owl"]
WITHOUT = samples(4).tensors[0]
UNLISTED = ConcatDataset([samples(4)])  # lists no labels
BLIND, SEEING = ["rollout", "attention"], ["rollout", "grad_rollout"]
FEATURES = {
    "labels of few classes": (Features, samples(4), {}, BLIND),
    "names of few classes": (Features, NAMED, {}, BLIND),
    "labels that nothing is compared with": (Embeddings, UNLISTED, {}, BLIND),
    "names make scores of them": (
        Embeddings,
        UNLISTED,
        {"class_names": [*"abcdefghijklmnopqrstuvwx"]},
        SEEING,
    ),
    "no labels": (Features, WITHOUT, {}, BLIND),
    "tokens": (Tokens, samples(4), {}, BLIND),
    "coordinates": (TwoNumbers, TensorDataset(WITHOUT, torch.randn(4, 2)), {}, BLIND),
    "one method": (Features, samples(4), {"methods": ["flow"]}, ["flow"]),
    "a score of features": (Features, samples(4), {"target": lambda x: x.norm(dim=1)}, SEEING),
    "a score of tokens": (Tokens, samples(4), {"target": lambda x: x[:, 0, 0]}, SEEING),
    "classes": (SmallClassifier, samples(4), {}, SEEING),
}


@pytest.mark.parametrize(("module", "data", "options", "methods"), FEATURES.values(), ids=FEATURES)
def test_features_are_no_classes(module, data, options, methods, tmp_path, monkeypatch, caplog):
    seen = []
    grid = render.grid
    monkeypatch.setattr(render, "grid", lambda *args, **kwargs: seen.append(args) or grid(*args, **kwargs))
    callback = RolloutCallback(on_error="raise", **options)
    loaders = DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)
    with caplog.at_level("INFO"):
        fit(callback, module=module, data=loaders, max_steps=1, default_root_dir=tmp_path)
    columns, captions = seen[0]
    assert list(columns)[1:] == [title_of(name) for name in methods]
    assert list(callback.state_dict()["maps"]) == methods
    says = module in (SmallClassifier, TwoNumbers) or "class_names" in options
    assert all(bool(str(caption)) == says for caption in captions)
    said = "numbers for each image" if module is Tokens else "outputs features"
    assert (said in caplog.text) == (methods[-1] != "grad_rollout")
    run = open_run(tmp_path)
    logits = torch.from_numpy(run.logits[0])
    played = captions_of(logits, torch.zeros(4).long(), kind=run.facts["kind"])
    assert all(bool(str(caption)) == says for caption in played), "the report would say classes"


def test_the_map_of_a_regression_is_about_the_number():
    data = DataLoader(TensorDataset(samples(4).tensors[0], torch.tensor([0.5, 1.5, -0.5, 2.0])), batch_size=4)
    maps = []
    for target in ("predicted", lambda numbers: numbers):
        callback = RolloutCallback(target=target, on_error="raise")
        fit(callback, module=Regression, data=(data, data), max_steps=1)
        maps.append(callback.state_dict()["maps"]["grad_rollout"])
    assert torch.equal(*maps)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("predicted", ""),
        ("label", "maps of the true class"),
        (1, "maps of owl"),
        (7, "maps of 7"),
        (len, "maps of your own score"),
    ],
)
def test_says_what_the_maps_are_about(target, said):
    from vitx.watch.showing import about

    assert about(target, ["cat", "owl"]) == said
    assert about(1, None) == "maps of 1"
    assert about("predicted", None, "numbers") == "maps of the number"
    assert about("predicted", None, "classes") == "maps of the likeliest class"
