from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchFeature

from vitx import VitxError
from vitx.watch.batches import read_batch

IMAGES = torch.rand(2, 3, 8, 8)
LABELS = torch.tensor([1, 0])
MASKS = torch.zeros(2, 8, 8, dtype=torch.bool)
MASKS[:, 2:4, 1:5] = True
BOXES = torch.tensor([[1.0, 2.0, 5.0, 4.0]] * 2)


@dataclass
class Batch:
    label: torch.Tensor
    image: torch.Tensor
    mask: torch.Tensor


Tuple = namedtuple("Tuple", ["target", "img", "boxes"])

BATCHES = {
    "tuple": (IMAGES, LABELS, MASKS),
    "list": [IMAGES, LABELS, MASKS],
    "masks with a channel, as numbers": (IMAGES, LABELS, MASKS[:, None].float()),
    "tuple with boxes": (IMAGES, LABELS, BOXES),
    "several boxes for each image": (IMAGES, LABELS, torch.stack([BOXES, torch.zeros(2, 4)], 1)),
    "images and a mapping": (IMAGES, {"label": LABELS, "boxes": BOXES}),
    "dict": {"image": IMAGES, "label": LABELS, "mask": MASKS},
    "dict of Hugging Face": {"pixel_values": IMAGES, "labels": LABELS, "masks": MASKS},
    "dict with boxes": {"images": IMAGES, "targets": LABELS, "bbox": BOXES},
    "BatchFeature": BatchFeature({"pixel_values": IMAGES, "labels": LABELS, "boxes": BOXES}),
    "named tuple": Tuple(LABELS, IMAGES, BOXES),
    "dataclass": Batch(LABELS, IMAGES, MASKS),
    "object": SimpleNamespace(image=IMAGES, labels=LABELS, box=BOXES),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_finds_images_labels_and_masks(batch):
    found = read_batch(batch)
    assert torch.equal(found.images, IMAGES)
    assert torch.equal(found.labels, LABELS)
    assert torch.equal(found.masks, MASKS)


def test_a_small_mask_is_no_box():
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    assert torch.equal(read_batch((IMAGES, LABELS, masks)).masks, masks)


@pytest.mark.parametrize(
    "batch", [IMAGES, (IMAGES,), (IMAGES, ["a", "b"], 3), {"image": IMAGES, "label": torch.tensor(3)}]
)
def test_what_is_not_there_is_none(batch):
    found = read_batch(batch)
    assert torch.equal(found.images, IMAGES)
    assert found.labels is None
    assert found.masks is None


def test_keeps_what_else_comes_with_each_image():
    age, one = torch.tensor([3.0, 4.0]), torch.tensor(7)
    found = read_batch({"image": IMAGES, "age": age, "one": one, "name": ["a", "b"]})
    assert list(found.inputs) == ["age"]
    assert torch.equal(found.inputs["age"], age)


@pytest.mark.parametrize(
    ("batch", "description"),
    [
        ({"picture": LABELS, "id": 3}, "the keys picture, id"),
        (torch.rand(3, 8, 8), r"shape \(3, 8, 8\)"),
        ("a text", "type str"),
        ((LABELS, MASKS), "type tuple"),
        ([], "type list"),
        (None, "type NoneType"),
    ],
)
def test_says_what_it_found_where_there_are_no_images(batch, description):
    with pytest.raises(VitxError, match=f"no images.*{description}: give batch_transform"):
        read_batch(batch)


TABLE = torch.tensor([[0, 3, 1, 1], [2, 6, 0, 1]])  # hospital, slide, label, domain: as WILDS has it
IDS = torch.arange(4) + 50


class TestForms:
    """Where names say nothing, the forms do."""

    def test_a_table_is_no_boxes_and_no_mask(self):
        found = read_batch((IMAGES, LABELS, TABLE))
        assert found.masks is None
        assert torch.equal(found.labels, LABELS)
        assert torch.equal(found.inputs["item 2"], TABLE)

    def test_a_number_for_the_whole_batch(self):
        assert read_batch((IMAGES, LABELS, torch.tensor(0.3))).masks is None

    def test_features_are_no_mask(self):
        assert read_batch((IMAGES, LABELS, torch.rand(2, 5, 64))).masks is None

    def test_numbers_of_samples_are_no_labels_where_there_are_better_ones(self):
        images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
        assert torch.equal(read_batch((images, IDS, labels)).labels, labels)
        assert torch.equal(read_batch({"picture": images, "id": IDS, "kind": labels}).labels, labels)
        assert torch.equal(read_batch((images, IDS)).labels, IDS)

    def test_several_classes_come_before_numbers_of_samples(self):
        images, several = torch.rand(4, 3, 8, 8), torch.eye(4)[:, :3]
        assert torch.equal(read_batch((images, several, IDS)).labels, several)
        assert torch.equal(read_batch((images, torch.rand(4), IDS % 2)).labels, IDS % 2)

    def test_a_mapping_between(self):
        found = read_batch((IMAGES, {"age": torch.rand(2)}, LABELS))
        assert torch.equal(found.labels, LABELS)
        assert "age" in found.inputs

    def test_mappings_in_mappings(self):
        found = read_batch({"sample": {"image": IMAGES, "label": LABELS}, "index": torch.tensor([8, 9])})
        assert torch.equal(found.images, IMAGES)
        assert torch.equal(found.labels, LABELS)

    def test_a_lone_tensor_of_that_form_is_the_images(self):
        found = read_batch({"scan": IMAGES, "kind": LABELS, "name": ["a", "b"]})
        assert found.name == "scan"
        assert torch.equal(found.labels, LABELS)

    def test_what_is_called_boxes_must_be_boxes(self):
        widths = torch.tensor([[5.0, 6.0, 2.0, 1.0]] * 2)  # x, y, width, height
        assert read_batch({"image": IMAGES, "label": LABELS, "boxes": widths}).masks is None
