"""Which images are watched, with what labels and masks."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm import create_model
from torch.utils.data import DataLoader, Subset

from tests.chosen import Lenient, Numbered, chosen, numbers
from tests.lightning_models import IMAGE, fit, samples
from tests.played_runs import open_run
from vitx import VitxError
from vitx.callbacks import RolloutCallback


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
    def collate(items):
        return {
            "pixel_values": torch.stack([item["image"] for item in items]),
            "labels": torch.tensor([item["label"] for item in items]),
        }

    loader = DataLoader(Subset(Numbered(), [19, 14, 9, 4]), collate_fn=collate)
    found = chosen(loader, num_images=2, num_measured=2)
    assert found.class_names == ("cat", "dog", "owl")
    assert numbers(found) == [14, 4]
    assert found.labels.tolist() == [2, 0]


def test_named_places_are_all_shown_in_their_order():
    found = chosen(DataLoader(Numbered()), images=[7, 3, 19, 0, 3], num_images=2)
    assert numbers(found) == [7, 3, 19, 0, 3]
    assert found.shown == (0, 1, 2, 3, 4)


def test_more_can_be_measured_than_shown():
    found = chosen(DataLoader(Numbered()), num_images=2, num_measured=10)
    assert len(found) == 10
    assert found.shown == (2, 7)


def test_one_image_of_each_class():
    found = chosen(DataLoader(Numbered()), per_class=True)
    assert found.labels.tolist() == [0, 1, 2, 3]


def test_places_chosen_before_a_resume_are_kept_where_they_fit():
    loader = DataLoader(Numbered())
    assert chosen(loader, before=(1, 2, 3, 19)).places == (1, 2, 3, 19)
    for other in ((1, 2, 3, 20), (1, 2, 3)):  # the data set has shrunk, or more images are requested
        assert chosen(loader, before=other).places == (2, 7, 12, 17)


def test_a_batch_transform_where_nothing_fits():
    class Odd(Numbered):
        label_name = "kind"

        def __getitem__(self, index):
            return {"data": [super().__getitem__(index)]}

    def transform(batch):
        return batch["data"][0]["image"], batch["data"][0]["kind"]

    assert chosen(DataLoader(Odd())).labels is None
    found = chosen(DataLoader(Odd()), batch_transform=transform)
    assert numbers(found) == [2, 7, 12, 17]
    assert found.labels.tolist() == [0, 1, 2, 3]


BOXES = torch.zeros(20, 4)
BOXES[:, 2:] = torch.arange(20.0)[:, None]


@pytest.mark.parametrize("boxes", [BOXES, BOXES[[2, 7, 12, 17]]], ids=["of all", "of those chosen"])
def test_given_boxes(boxes):
    found = chosen(DataLoader(Numbered()), boxes=boxes)
    assert found.masks.sum((1, 2)).tolist() == [4, 49, 144, 289]


def test_given_masks_come_before_those_of_the_data_set():
    masks = torch.ones(4, 2, 2)
    assert chosen(DataLoader(samples(20)), boxes=masks).masks.all()
    with pytest.raises(VitxError, match="boxes has 3 entries for 4 images"):
        chosen(DataLoader(samples(20)), boxes=masks[:3])


def test_images_are_prepared_as_the_module_prepares_its_batches():
    class OnDevice(Lenient):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer.world_size == 1
            return {**batch, "image": batch["image"] + 0.5} if isinstance(batch, dict) else batch

    assert numbers(chosen(DataLoader(Numbered()), OnDevice)) == [2.5, 7.5, 12.5, 17.5]


def test_random_transforms_give_the_same_images_in_every_run(tmp_path):
    class Noisy(Numbered):
        def __getitem__(self, index):
            return {"image": torch.rand(3, IMAGE, IMAGE), "label": 0}

    watched = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        callback = RolloutCallback(images=Noisy(), on_error="raise")
        fit(callback, default_root_dir=tmp_path / str(seed), max_epochs=1)
        watched.append(open_run(tmp_path / str(seed)).pixels)
    assert np.array_equal(*watched)


def test_files_go_through_the_models_own_transform(tmp_path):
    path = tmp_path / "gray.png"
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
        ([0, 20], "the validation set has 20 images, 0 to 19: there is no 20"),
        ([], "is empty"),
        (torch.rand(3, IMAGE, IMAGE), "no images"),
    ]
    for images, sentence in cases:
        with pytest.raises(VitxError, match=sentence):
            chosen(DataLoader(Numbered()), images=images, model=model)
