"""Lightning runs whose batches are unusual, and what the callback finds out about them."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import vitx
from tests.lightning_models import SmallClassifier, fit, samples
from tests.modules import Around
from vitx.callbacks import RolloutCallback
from vitx.watch import showing

COUNT = 8
IMAGES, CLASSES, _ = samples(COUNT).tensors
AGES = torch.tensor([51.0, 62, 43, 74, 35, 86, 27, 68])
UNCHECKED = {"num_sanity_val_steps": 0}


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


class PairsOf(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, place):
        return {"one": IMAGES[place], "two": IMAGES[-1 - place], "kind": int(CLASSES[place])}


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


def run(module, data, monkeypatch, caplog, beside=None, first=False, validation=True, fitted=None, **options):
    """Train, and return the callback, the captions of each firing, and its messages about what it watches."""
    captions, real = [], showing.captions_of
    monkeypatch.setattr(
        showing, "captions_of", lambda *a, **k: captions.append(real(*a, **k)) or captions[-1]
    )
    callback = RolloutCallback(**{"num_images": COUNT, "on_error": "raise", "every_n_epochs": None} | options)
    callbacks = [one for one in ((beside, callback) if first else (callback, beside)) if one]
    loader = DataLoader(data, batch_size=4)
    settings = {"max_epochs": 1, "num_sanity_val_steps": 2} | (fitted or {})
    with caplog.at_level("INFO"):
        fit(*callbacks, module=module, data=(loader, loader if validation else None), **settings)
    return callback, captions, [one.message for one in caplog.records if "watches" in one.message]


def assert_maps(callback, module, function):
    module.eval()
    expected = vitx.explain(Around(function), IMAGES, "grad_rollout").maps
    assert torch.allclose(callback.state_dict()["maps"]["grad_rollout"], expected, rtol=1e-4, atol=1e-7)


class Third(Ages):
    """A module whose labels are the third item of a batch, which only its step shows."""

    def forward(self, images):
        return SmallClassifier.forward(self, images)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[2])


class OneOf(Ages):
    def forward(self, images):
        return SmallClassifier.forward(self, images)

    def loss(self, batch):
        return F.cross_entropy(self(batch["one"]), batch["kind"])
