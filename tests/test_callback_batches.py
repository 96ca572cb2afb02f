"""Whole Lightning runs, from whose steps the callback finds out how a batch is used."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, TensorDataset

from tests.lightning_models import SmallClassifier
from tests.watched_runs import (
    AGES,
    CLASSES,
    IMAGES,
    UNCHECKED,
    Ages,
    Batched,
    Nowhere,
    OneOf,
    PairsOf,
    assert_maps,
    run,
)
from vitx.watch.explaining import SampleExplainer


class Pairs(Ages):
    """A module that compares two images, which their names do not tell from masks or other tensors."""

    def forward(self, one, other):
        return SmallClassifier.forward(self, one) - 0.5 * SmallClassifier.forward(self, other)

    def loss(self, batch):
        return F.cross_entropy(self(batch["one"], batch["two"]), batch["kind"])


def test_an_age_between_image_and_label(monkeypatch, caplog):
    module = Ages()
    callback, captions, said = run(module, TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert [caption.label for caption in captions[0]] == [str(label) for label in CLASSES.tolist()]
    assert "; images: item 0 of a batch; labels: item 2; " in said[0]
    assert_maps(callback, module, lambda images: module((images - 0.1) / 2, AGES / 100))


def test_two_images(monkeypatch, caplog):
    module = Pairs()
    callback, captions, _ = run(module, PairsOf(), monkeypatch, caplog)
    assert [caption.label for caption in captions[0]] == [str(label) for label in CLASSES.tolist()]
    assert_maps(callback, module, lambda images: module(images, IMAGES.flip(0)))


def test_a_forward_of_the_batch(monkeypatch, caplog):
    module = Batched()
    callback, captions, _ = run(module, TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert captions[0][0].label == "0"
    assert_maps(callback, module, lambda images: module((images,)))


class Similar(Nowhere):
    """A module that learns features, which cannot be told from class scores by their width."""

    def training_step(self, batch, _):
        features = SmallClassifier.forward(self, batch[0])
        return (features @ features.T).mean()


def test_a_training_without_validation_is_seen_in_its_first_step(monkeypatch, caplog):
    module, data = Similar(), TensorDataset(IMAGES, AGES, CLASSES)
    module.forward = lambda images: SmallClassifier.forward(module, images)
    shown = {"images": TensorDataset(IMAGES, CLASSES)}
    callback, captions, said = run(module, data, monkeypatch, caplog, validation=False, **shown)
    assert captions[0][0].label == "0"
    assert all(caption.prediction == "" for caption in captions[-1])
    assert "the model outputs features" in said[-1]
    assert set(callback.state_dict()["maps"]) == {"rollout", "attention"}


class Formless(SmallClassifier):
    """A module without `forward`: its steps show what is run. Resumed runs have no sanity check."""

    forward = pl.LightningModule.forward

    def loss(self, images, labels):
        return F.cross_entropy(SmallClassifier.forward(self, images), labels)

    def training_step(self, batch, _):
        return self.loss(batch[0].flip(-1), batch[1])

    def validation_step(self, batch, _):
        self.loss(*batch)


def test_a_module_without_forward_is_explained_as_its_training_runs_it_until_it_is_validated(
    monkeypatch, caplog
):
    options = {"fitted": UNCHECKED, "at_start": False, "every_n_steps": 4, "every_n_epochs": 1}
    data = ConcatDataset([TensorDataset(IMAGES, CLASSES)] * 3)
    run_by, real = [], SampleExplainer.explain
    monkeypatch.setattr(
        SampleExplainer, "explain", lambda self, *a: run_by.append(self.observed.where) or real(self, *a)
    )
    _, _, said = run(Formless(), data, monkeypatch, caplog, **options)
    assert run_by == ["training_step", "validation_step"]
    assert len(said) == 1, "the same is said twice"


def test_is_seen_at_the_first_validation_where_there_is_no_sanity_check(monkeypatch, caplog):
    module = Batched()
    with pytest.warns(UserWarning, match="shows nothing"):
        _, captions, said = run(
            module,
            TensorDataset(IMAGES, AGES, CLASSES),
            monkeypatch,
            caplog,
            fitted=UNCHECKED,
            on_error="warn",
        )
    assert captions[-1][0].label == "0"
    assert "labels: item 2;" in said[-1]


class Normalizing(pl.Callback):
    """A callback that normalizes each batch in a hook, as anomalib's PreProcessor does."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        batch["one"] = (batch["one"] - 0.1) / 2


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_normalizes_in_a_hook(first, monkeypatch, caplog):
    module = OneOf()
    callback, *_ = run(module, PairsOf(), monkeypatch, caplog, beside=Normalizing(), first=first)
    assert_maps(callback, module, lambda images: module((images - 0.1) / 2))


class Augmenting(OneOf):
    """A module that augments batches on the device while it trains, as with Kornia."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "one": batch["one"].flip(-1)} if self.training else batch


def test_watched_images_are_not_augmented(monkeypatch, caplog):
    module = Augmenting()
    callback, *_ = run(module, PairsOf(), monkeypatch, caplog)
    assert_maps(callback, module, module)


class Compiled(Batched):
    """A module with a compiled part, whose step is not recorded."""

    def __init__(self):
        super().__init__()
        self.vit.forward = torch.compile(self.vit.forward, backend="eager")

    def forward(self, images):
        return SmallClassifier.forward(self, images)

    def loss(self, batch):
        return F.cross_entropy(self(self.prepared(batch[0])), batch[2])

    def prepared(self, images):
        return (images - 0.1) / 2


class ByNumpy(Compiled):
    """A module whose step prepares images as arrays, as with an image processor."""

    __init__ = Batched.__init__

    def prepared(self, images):
        return torch.from_numpy((images.numpy() - 0.1) / 2)


@pytest.mark.parametrize("module", [Compiled, ByNumpy])
@pytest.mark.parametrize("told", [{}, {"batch_transform": lambda batch: ((batch[0] - 0.1) / 2, batch[2])}])
def test_says_where_it_was_not_seen_what_the_step_does_to_images(module, told, monkeypatch, caplog):
    data = TensorDataset(IMAGES, AGES, CLASSES)
    _, _, said = run(module(), data, monkeypatch, caplog, **told)
    assert len(said) == 1
    assert ("what validation_step does to the images was not seen: if it changes" in said[0]) == (not told)


class Reading(Ages):
    """A module that also takes texts, padded to the longest of each batch."""

    def forward(self, images, ids=None):
        scores = SmallClassifier.forward(self, images)
        return scores if ids is None else scores + ids.sum(1, keepdim=True)

    def loss(self, batch):
        return F.cross_entropy(self(batch["one"], batch["ids"]), batch["kind"])


class PairsWithTexts(PairsOf):
    def __getitems__(self, places):
        return [self[place] | {"ids": torch.ones(1 + max(places))} for place in places]


def test_says_what_of_the_step_is_left_out(monkeypatch, caplog):
    _, _, said = run(Reading(), PairsWithTexts(), monkeypatch, caplog)
    assert "validation_step also uses ids, which is left out here: give batch_transform" in said[0]


class Scaling(OneOf):
    """A module whose step scales whole numbers."""

    def loss(self, batch):
        return F.cross_entropy(self(batch[0] / 255), batch[1])


def test_whole_numbers_are_refused_until_it_is_seen_how_they_are_scaled(monkeypatch, caplog):
    data = TensorDataset((IMAGES * 40).byte(), CLASSES)
    with pytest.warns(UserWarning, match="at step 0: images must be floating point, found torch.uint8"):
        _, captions, _ = run(Scaling(), data, monkeypatch, caplog, fitted=UNCHECKED, on_error="warn")
    assert captions[0][0].label == "0"
