"""Whole Lightning runs, from whose steps the callback finds out how a batch is used."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import vitx
from tests.lightning_models import SmallClassifier, fit, samples
from tests.played_runs import open_run
from vitx.callbacks import RolloutCallback
from vitx.watch import showing
from vitx.watch.explaining import SampleExplainer

COUNT = 8
IMAGES, CLASSES, _ = samples(COUNT).tensors
AGES = torch.tensor([51.0, 62, 43, 74, 35, 86, 27, 68])


class Ages(SmallClassifier):
    """A module whose `forward` also takes an age; its step scales the age and normalizes the images."""

    def __init__(self):
        super().__init__()
        self.age = nn.Linear(1, 3)
        nn.init.constant_(self.age.weight, 5.0)

    def forward(self, images, age):
        return super().forward(images) + self.age(age[:, None])

    def loss(self, batch):
        images, age, labels = batch
        return F.cross_entropy(self((images - 0.1) / 2, age / 100), labels)

    def training_step(self, batch, _):
        return self.loss(batch)

    def validation_step(self, batch, _):
        self.loss(batch)


class Pairs(Ages):
    """A module that compares two images, which their names do not tell from masks or other tensors."""

    def forward(self, one, other):
        return SmallClassifier.forward(self, one) - 0.5 * SmallClassifier.forward(self, other)

    def loss(self, batch):
        return F.cross_entropy(self(batch["one"], batch["two"]), batch["kind"])


class PairsOf(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, place):
        return {"one": IMAGES[place], "two": IMAGES[-1 - place], "kind": int(CLASSES[place])}


class Probable(Ages):
    """A module whose `forward` ends in a sigmoid, and whose loss skips unknown labels."""

    def forward(self, images):
        return SmallClassifier.forward(self, images).sigmoid()

    def loss(self, batch):
        known = batch[2] >= 0
        return F.binary_cross_entropy(self(batch[0])[known], batch[2][known])


class Graded(Ages):
    """A regression of few grades, which look like classes."""

    def loss(self, batch):
        return F.mse_loss(self(batch[0], batch[1] / 100)[:, 0], batch[2].float())


class Batched(Ages):
    """A module whose `forward` takes the whole batch."""

    def forward(self, batch):
        return SmallClassifier.forward(self, batch[0])

    def loss(self, batch):
        return F.cross_entropy(self(batch), batch[2])


class Nowhere(Batched):
    """A module whose validation step compares its output with nothing."""

    def validation_step(self, batch, _):
        return self(batch)


def run(module, data, monkeypatch, caplog, sanity=2, beside=None, first=False, validation=True, **options):
    """Train, and return the callback, the captions of each firing, and its messages about what it watches."""
    captions, real = [], showing.captions_of
    monkeypatch.setattr(
        showing, "captions_of", lambda *a, **k: captions.append(real(*a, **k)) or captions[-1]
    )
    callback = RolloutCallback(
        **{"num_images": COUNT, "on_error": "raise", "every_n_epochs": None, **options}
    )
    callbacks = [one for one in ((beside, callback) if first else (callback, beside)) if one]
    loader = DataLoader(data, batch_size=4)
    settings = {"max_epochs": 1, "num_sanity_val_steps": sanity, "default_root_dir": "."}
    with caplog.at_level("INFO"):
        fit(*callbacks, module=module, data=(loader, loader if validation else None), **settings)
    said = [record.message for record in caplog.records if "watches" in record.message]
    return callback, captions, said


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class As(nn.Module):
    """A module that runs a given function of the images, as a step runs its model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def assert_maps(callback, module, function):
    module.eval()
    expected = vitx.explain(As(function), IMAGES, "grad_rollout").maps
    assert torch.allclose(callback.state_dict()["maps"]["grad_rollout"], expected, rtol=1e-4, atol=1e-7)


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
    options = {"sanity": 0, "at_start": False, "every_n_steps": 4, "every_n_epochs": 1}
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
            module, TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog, sanity=0, on_error="warn"
        )
    assert captions[-1][0].label == "0"
    assert "labels: item 2;" in said[-1]


class Third(Ages):
    """A module whose labels are the third item of a batch, which only its step shows."""

    def forward(self, images):
        return SmallClassifier.forward(self, images)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[2])


def test_what_is_kept_beside_the_maps_is_what_was_seen_last(tmp_path, monkeypatch, caplog):
    data = TensorDataset(IMAGES, AGES, CLASSES)
    _, captions, _ = run(Third(), data, monkeypatch, caplog, sanity=0)
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
    of_class = As((lambda images: module(images)[:, :1]) if kind is OneLogit else module)
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


class Normalizing(pl.Callback):
    """A callback that normalizes each batch in a hook, as anomalib's PreProcessor does."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        batch["one"] = (batch["one"] - 0.1) / 2


class OneOf(Ages):
    def forward(self, images):
        return SmallClassifier.forward(self, images)

    def loss(self, batch):
        return F.cross_entropy(self(batch["one"]), batch["kind"])


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
        _, captions, _ = run(Scaling(), data, monkeypatch, caplog, sanity=0, on_error="warn")
    assert captions[0][0].label == "0"


class NotAlone(Graded):
    """A regression that does not run on one image alone."""

    def forward(self, images, age):
        if len(images) == 1:
            raise ValueError("one is too few")
        return super().forward(images, age)


def test_says_where_the_kind_of_output_is_unknown(monkeypatch, caplog):
    _, _, said = run(NotAlone(), TensorDataset(IMAGES, AGES, CLASSES), monkeypatch, caplog)
    assert "the output is taken for scores of classes, as one image alone" in said[0]
