from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchFeature

from vitx import VitxError
from vitx.callbacks.batches import read_batch

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
    with pytest.raises(VitxError, match=f"no images.*{description}: give the callback batch_transform"):
        read_batch(batch)
