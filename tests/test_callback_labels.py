"""Whole Lightning runs, from whose steps the callback finds out what the labels are."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import vitx
from tests.lightning_models import SmallClassifier
from tests.modules import Around
from tests.played_runs import open_run
from tests.watched_runs import AGES, CLASSES, IMAGES, UNCHECKED, Ages, Batched, Graded, Nowhere, Third, run


class Probable(Ages):
    """A module whose `forward` ends in a sigmoid, and whose loss skips unknown labels."""

    def forward(self, images):
        return SmallClassifier.forward(self, images).sigmoid()

    def loss(self, batch):
        known = batch[2] >= 0
        return F.binary_cross_entropy(self(batch[0])[known], batch[2][known])


def test_probabilities_with_unknown_labels(monkeypatch, caplog):
    labels = F.one_hot(CLASSES, 3).float()
    labels[0] = torch.tensor([1.0, -1, 0])
    module = Probable()
    _, captions, _ = run(module, TensorDataset(IMAGES, AGES, labels), monkeypatch, caplog)
    shares = module.eval()(IMAGES).detach()
    said = [
        " + ".join(str(i) for i, share in enumerate(row) if share > 0.5) or "none" for row in shares.tolist()
    ]
    assert [caption.prediction for caption in captions[-1]] == said
    assert captions[-1][0].label == "0"
    assert captions[-1][0].right == (bool(shares[0, 0] > 0.5) and not bool(shares[0, 2] > 0.5))


def test_grades_are_numbers(monkeypatch, caplog):
    _, captions, _ = run(Graded(), TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert [caption.label for caption in captions[0]] == [f"{label}.00" for label in CLASSES.tolist()]
    assert all(caption.right is None for caption in captions[0])


def test_what_is_told_wins(monkeypatch, caplog):
    data = TensorDataset(IMAGES, AGES, CLASSES, CLASSES.flip(0))
    module = Ages()
    module.loss = lambda batch: Ages.loss(module, batch[:3])
    _, captions, said = run(module, data, monkeypatch, caplog, labels=3)
    assert [caption.label for caption in captions[0]] == [str(label) for label in CLASSES.flip(0).tolist()]
    assert "labels: item 3;" in said[0]


def test_what_nobody_says_is_left_out(monkeypatch, caplog):
    _, captions, said = run(Nowhere(), TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert all(caption.label is None for caption in captions[0])
    assert "labels: none (if they are item 1, give labels=1)" in said[0]


def test_what_is_kept_beside_the_maps_is_what_was_seen_last(tmp_path, monkeypatch, caplog):
    data = TensorDataset(IMAGES, AGES, CLASSES)
    _, captions, _ = run(
        Third(), data, monkeypatch, caplog, fitted=UNCHECKED | {"default_root_dir": tmp_path}
    )
    assert captions[0][0].label is None
    assert open_run(tmp_path).labels.tolist() == CLASSES.tolist()


class Named(TensorDataset):
    classes = ("plane", "bird", "cat", "deer", "dog")


@pytest.mark.parametrize(
    ("data", "told"), [(Named, None), (TensorDataset, ["a", "b"]), (Named, list("abcd"))]
)
def test_names_of_other_classes_are_left_out(data, told, monkeypatch, caplog):
    """As of a data set of five classes that a target_transform turns into three."""
    _, captions, said = run(Third(), data(IMAGES, AGES, CLASSES), monkeypatch, caplog, class_names=told)
    assert [caption.label for caption in captions[0]] == [str(label) for label in CLASSES.tolist()]
    count = len(told or Named.classes)
    assert f"{count} names for 3 classes are left out: give class_names, one for each" in said[0]


class OneLogit(Third):
    """A module of two classes and a single output."""

    def loss(self, batch):
        found = self(batch[0])[:, :1].reshape(batch[2].shape)
        return F.binary_cross_entropy_with_logits(found, batch[2])


TWO = CLASSES.clamp(max=1).float()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(OneLogit, TWO), (OneLogit, TWO[:, None]), (Third, F.one_hot(CLASSES, 3).float())],
    ids=["one logit", "one logit in a column", "one-hot"],
)
def test_maps_of_the_label_in_each_usual_form(kind, labels, monkeypatch, caplog):
    module = kind()
    callback, captions, _ = run(
        module, TensorDataset(IMAGES, AGES, labels), monkeypatch, caplog, target="label"
    )
    classes = TWO if kind is OneLogit else CLASSES
    assert [caption.label for caption in captions[0]] == [str(int(label)) for label in classes]
    module.eval()
    of_class = Around((lambda images: module(images)[:, :1]) if kind is OneLogit else module)
    expected = vitx.explain(of_class, IMAGES, "grad_rollout", target=classes.long()).maps
    assert torch.allclose(callback.state_dict()["maps"]["grad_rollout"], expected, rtol=1e-4, atol=1e-7)


def test_maps_of_the_label_need_one_class(monkeypatch, caplog):
    several = F.one_hot(CLASSES, 3).float() + F.one_hot(CLASSES.flip(0), 3)
    with pytest.raises(vitx.VitxError, match="found labels for an output of classes: give labels, a class"):
        run(ByHand(), TensorDataset(IMAGES, AGES, several.clamp(max=1)), monkeypatch, caplog, target="label")


class ByHand(Third):
    """A module of several classes."""

    def loss(self, batch):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[2])


class Contrastive(Batched):
    """A supervised contrastive loss by hand, which compares the similarity of all pairs of images."""

    def loss(self, batch):
        found = F.normalize(self(batch), dim=1)
        of_one_class = (batch[2][:, None] == batch[2]).float()
        return -(of_one_class * (found @ found.T).log_softmax(1)).sum()


@pytest.mark.parametrize("count", [8, 7])
def test_other_images_are_no_classes(count, monkeypatch, caplog):
    data = TensorDataset(IMAGES[:count], AGES[:count], CLASSES[:count])
    _, captions, said = run(Contrastive(), data, monkeypatch, caplog)
    assert all(caption.prediction == "" for caption in captions[0])
    assert "the model outputs features" in said[0]


class NotAlone(Graded):
    """A regression that does not run on one image alone."""

    def forward(self, images, age):
        if len(images) == 1:
            raise ValueError("one is too few")
        return super().forward(images, age)


def test_says_where_the_kind_of_output_is_unknown(monkeypatch, caplog):
    _, _, said = run(NotAlone(), TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert "the output is taken for scores of classes, as one image alone" in said[0]
