"""The images that the callback would watch, of data sets whose images are filled with their own index."""

import lightning.pytorch as pl
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
)

from tests.lightning_models import IMAGE, SmallClassifier, fit, samples
from vitx.callbacks.lightning import LightningHost
from vitx.watch import Settings
from vitx.watch.images import Selection


class Watch(pl.Callback):
    """A callback that chooses samples when RolloutCallback would."""

    def __init__(self, settings, model=None, before=None):
        self.settings, self.model, self.before = settings, model, before

    def on_train_start(self, trainer, pl_module):
        host = LightningHost(trainer, pl_module)
        host.model = self.model or pl_module
        self.found = Selection(self.settings, host).choose(self.before)


class Lenient(SmallClassifier):
    """A classifier that accepts validation batches of every kind."""

    def validation_step(self, *_):
        pass


def chosen(validation=None, module=Lenient, model=None, before=None, num_measured=4, **selection):
    count = selection.pop("num_images", 4)
    watch = Watch(Settings(num_images=(count, num_measured), **selection), model, before)
    fit(watch, module=module, data=(DataLoader(samples(4), batch_size=4), validation), fast_dev_run=True)
    return watch.found


class Numbered(Dataset):
    """Images that are filled with their own index."""

    classes = ("cat", "dog", "owl")
    label_name = "label"

    def __init__(self, length=20):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": torch.full((3, IMAGE, IMAGE), float(index)), self.label_name: index // 5}


def numbers(found):
    return found.images[:, 0, 0, 0].tolist()


class Stream(IterableDataset):
    def __init__(self, batch=None):
        self.batch = batch

    def __iter__(self):
        for value in range(100):
            shape = (3, IMAGE, IMAGE) if self.batch is None else (self.batch, 3, IMAGE, IMAGE)
            yield torch.full(shape, float(value)), torch.tensor([0] * (self.batch or 1))
