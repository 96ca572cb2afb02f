import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from timm import create_model
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tests.lightning_models import IMAGE, SmallClassifier, samples
from vitx import VitxError
from vitx.callbacks.images import Selection


class Watch(pl.Callback):
    """Chooses samples where the callback would."""

    def __init__(self, images=None, count=4, model=None):
        self.selection, self.model = Selection(images, count, count), model

    def on_train_start(self, trainer, pl_module):
        self.found = self.selection.choose(trainer, self.model or pl_module)


def chosen(images=None, count=4, validation=None, model=None):
    watch = Watch(images, count, model)
    trainer = pl.Trainer(
        fast_dev_run=True,
        accelerator="cpu",
        callbacks=[watch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SmallClassifier(), DataLoader(samples(4), batch_size=4), validation)
    return watch.found


def test_evenly_spaced_from_the_validation_set_with_labels_and_masks():
    data = samples(20, seed=3)
    found = chosen(validation=DataLoader(data, batch_size=7))
    assert found.places == (2, 7, 12, 17)
    assert torch.equal(found.images, data.tensors[0][list(found.places)])
    assert found.labels.tolist() == [2, 1, 0, 2]
    assert torch.equal(found.masks, data.tensors[2][list(found.places)])


def test_all_of_a_small_set_and_none_without_one():
    assert chosen(validation=DataLoader(samples(3))).places == (0, 1, 2)
    with pytest.raises(VitxError, match="no validation set"):
        chosen()


def test_the_loaders_own_collate_and_the_sets_own_names():
    class Dicts(Dataset):
        classes = ("cat", "dog", "owl")

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return torch.full((3, IMAGE, IMAGE), float(index)), index % 3

    def collate(items):
        return {
            "pixel_values": torch.stack([i for i, _ in items]),
            "labels": torch.tensor([x for _, x in items]),
        }

    class Model(SmallClassifier):
        def validation_step(self, batch, _):
            return None

    watch = Watch(count=2)
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[watch], enable_progress_bar=False)
    loader = DataLoader(Subset(Dicts(), [5, 4, 3, 2]), collate_fn=collate)
    trainer.fit(Model(), DataLoader(samples(4), batch_size=4), loader)
    assert watch.found.class_names == ("cat", "dog", "owl")
    assert watch.found.labels.tolist() == [4 % 3, 2 % 3]
    assert watch.found.images[:, 0, 0, 0].tolist() == [4, 2]


def test_a_stream_gives_its_first_images():
    class Stream(IterableDataset):
        def __iter__(self):
            for value in range(100):
                yield torch.full((3, IMAGE, IMAGE), float(value)), 0

    found = chosen(images=Stream(), count=3)
    assert found.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert found.places is None


def test_files_go_through_the_models_own_transform(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (300, 200), (128, 128, 128)).save(path)
    model = create_model("deit_tiny_patch16_224", depth=1)
    found = chosen(images=[path, path], model=model)
    assert found.images.shape == (2, 3, 224, 224)
    mean, std = torch.tensor(model.pretrained_cfg["mean"]), torch.tensor(model.pretrained_cfg["std"])
    expected = (128 / 255 - mean) / std
    assert torch.allclose(found.images[0].mean((1, 2)), expected, atol=1e-5)


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "note.jpg").write_text("no picture")
    model = create_model("deit_tiny_patch16_224", depth=1)
    cases = [
        (42, "images must be a tensor, a data set"),
        ([tmp_path / "note.jpg"], "note.jpg"),
        ([tmp_path / "absent.jpg"], "absent.jpg"),
        (torch.rand(3, IMAGE, IMAGE), "no images"),
    ]
    for images, sentence in cases:
        with pytest.raises(VitxError, match=sentence):
            chosen(images=images, model=model)
