from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchFeature

from vitx import VitxError
from vitx.watch.batches import objects, read_batch
from vitx.watch.images import join

IMAGES = torch.rand(2, 3, 8, 8)
LABELS = torch.tensor([1, 0])
MASKS = torch.zeros(2, 8, 8, dtype=torch.bool)
MASKS[:, 2:4, 1:5] = True
BOXES = torch.tensor([[1.0, 2.0, 5.0, 4.0]] * 2)
SURE_BOXES = torch.tensor([[4.0, 0, 8, 8], [0.0, 0, 8, 4]])  # of which one leaves the picture in other forms


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
    assert torch.equal(read_batch((IMAGES, LABELS, masks), {"boxes": 2}).masks, masks)


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


TABLE = torch.tensor([[0, 3, 1, 1], [2, 6, 0, 1]])  # hospital, slide, label, domain, as in WILDS
AGES = torch.tensor([50.0, 61.0])


class TestLeftOut:
    """Items that were neither observed nor named by the user, and have no usual name, are not guessed."""

    @pytest.mark.parametrize("third", [TABLE, torch.tensor(0.3), torch.rand(2, 5, 64), AGES])
    def test_of_three_items_which_holds_the_labels(self, third):
        found = read_batch((IMAGES, LABELS, third))
        assert found.labels is None
        assert found.masks is None
        assert "labels: none (if they are item 1, give labels=1)" in found.found

    def test_numbers_beside_images_that_are_called_otherwise(self):
        assert read_batch({"scan": IMAGES, "kind": LABELS}).labels is None

    def test_what_is_called_boxes_and_is_none(self):
        widths = torch.tensor([[5.0, 6.0, 2.0, 1.0]] * 2)  # x, y, width, height
        found = read_batch({"image": IMAGES, "label": LABELS, "boxes": widths})
        assert found.masks is None
        assert any("item 'boxes' left out: boxes must have x1 < x2" in one for one in found.found)

    @pytest.mark.parametrize(
        ("batch", "name"),
        [
            ((IMAGES, LABELS, torch.rand(2, 1, 8, 8) + 0.1), 2),  # a depth
            ((IMAGES, LABELS, torch.rand(2, 4, 4) > 0.5), 2),  # hidden patches, as in BEiT
            ({"image": IMAGES, "mask": MASKS + 255 * ~MASKS}, "mask"),  # 255 to ignore
            ((SimpleNamespace(tensors=IMAGES, mask=MASKS), LABELS), "0.mask"),  # padding, as in DETR
        ],
    )
    def test_masks_of_something_else(self, batch, name):
        found = read_batch(batch)
        assert found.masks is None
        told = f"left out, as it may not hold masks of objects: if it does, give boxes={name!r}"
        assert told in found.found[-1]
        assert read_batch(batch, {"boxes": name}).masks is not None

    @pytest.mark.parametrize(
        "boxes",
        [
            torch.tensor([[1.0, 1, 3, 2]] * 2),  # x, y, width, height, as in COCO
            torch.tensor([[0.4, 0.4, 0.6, 0.7]] * 2),  # center and size, as in DETR
            torch.tensor([[1.0, 3, 6, 4]] * 2),  # two keypoints
        ],
    )
    def test_boxes_whose_form_nothing_tells(self, boxes):
        part = read_batch({"image": IMAGES, "bbox": boxes})
        found = join([part, part], 4)
        assert found.masks is None
        doubt = "item 'bbox' left out, as it may not hold x1, y1, x2, y2: if it does, give boxes='bbox'"
        assert doubt in found.found
        told = read_batch({"image": IMAGES, "bbox": boxes}, {"boxes": "bbox"})
        assert join([told], 2).masks is not None

    def test_one_batch_tells_the_form_of_all_boxes(self):
        found = join([read_batch({"image": IMAGES, "bbox": one}) for one in (BOXES, SURE_BOXES)], 4)
        assert torch.equal(found.masks[:2], MASKS)
        assert "boxes: item 'bbox'" in found.found

    @pytest.mark.parametrize("count", [2, 3])
    def test_objects_of_a_single_image(self, count):
        """As in the targets of a detector, of which the first image has as many as the batch has images."""
        targets = [{"boxes": torch.tensor([[1.0, 2, 5, 4]] * n), "labels": LABELS} for n in (2, count)]
        found = read_batch((IMAGES, targets))
        assert found.masks is None
        assert found.labels is None
        assert not found.inputs

    def test_one_of_two_images(self):
        with pytest.raises(VitxError, match="2 items of the batch may be the images, left, right: give show"):
            read_batch({"left": IMAGES, "right": IMAGES, "label": LABELS})


def test_says_where_each_part_lies():
    assert read_batch((IMAGES, LABELS, SURE_BOXES)).found == (
        "images: item 0 of a batch",
        "labels: item 1",
        "boxes: item 2",
    )
    named = read_batch({"image": IMAGES, "truth": {"label": LABELS}}).found
    assert named == ("images: item 'image' of a batch", "labels: item 'truth.label'")
    assert read_batch(IMAGES).found == ("labels: none",)


class TestTold:
    @pytest.mark.parametrize(
        ("batch", "labels"),
        [((IMAGES, AGES, LABELS), 2), ((IMAGES, {"kind": LABELS}), "kind"), ((IMAGES, AGES, LABELS), "2")],
    )
    def test_labels(self, batch, labels):
        assert torch.equal(read_batch(batch, {"labels": labels}).labels, LABELS)

    def test_which_images_are_shown(self):
        batch = {"left": IMAGES, "right": 1 - IMAGES, "label": LABELS}
        assert torch.equal(read_batch(batch, {"show": "right"}).images, 1 - IMAGES)

    def test_boxes(self):
        assert torch.equal(read_batch((IMAGES, AGES, BOXES, 3), {"boxes": 2}).masks, MASKS)

    @pytest.mark.parametrize(
        ("batch", "items", "sentence"),
        [
            ((IMAGES, LABELS), {"labels": "age"}, "no item 'age' for each image: its items are 0 and 1$"),
            ((IMAGES, LABELS), {"show": 2}, "the batch has no item 2: its items are 0 and 1$"),
            (IMAGES, {"labels": 7}, "no item 7 for each image: its items are without names"),
            ((IMAGES, {"a": {"x": AGES}, "b": {"x": AGES}}), {"labels": "x"}, "in 'x': give labels='1.a.x'"),
        ],
    )
    def test_an_item_that_is_not_there(self, batch, items, sentence):
        with pytest.raises(VitxError, match=sentence):
            read_batch(batch, items)


class TestNested:
    def test_a_mapping_between(self):
        found = read_batch((IMAGES, {"label": LABELS, "age": AGES}))
        assert torch.equal(found.labels, LABELS)
        assert torch.equal(found.inputs["1.age"], AGES)

    def test_images_with_what_is_known_of_them(self):
        assert torch.equal(read_batch(((IMAGES, {"age": AGES}), LABELS)).labels, LABELS)

    def test_views(self):
        """As in DINO; the first view is shown."""
        assert torch.equal(read_batch(([IMAGES, 1 - IMAGES], LABELS)).images, IMAGES)

    def test_mappings_in_mappings(self):
        found = read_batch({"sample": {"image": IMAGES, "label": LABELS}, "index": torch.tensor([8, 9])})
        assert torch.equal(found.images, IMAGES)
        assert torch.equal(found.labels, LABELS)


class TestObjects:
    def test_shares_of_the_picture(self):
        masks, said = objects(BOXES / 8, (8, 8))
        assert torch.equal(masks, MASKS)
        assert said == "boxes, shares of the picture, scaled"

    def test_boxes_within_one_pixel_of_a_larger_picture(self):
        with pytest.raises(VitxError, match="within 8 x 8 pixels"):
            objects(torch.tensor([[0.5, 0.5, 0.4, 0.6]]), (8, 8))

    def test_neither_boxes_nor_masks(self):
        with pytest.raises(VitxError, match=r"boxes must be .*, or masks .*, found \(2, 5\)"):
            objects(torch.rand(2, 5), (8, 8))


def test_patches_that_a_processor_cut_are_no_images():
    batch = {"pixel_values": torch.rand(64, 1176), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    with pytest.raises(VitxError, match=r"'pixel_values' holds patches .* \(64, 1176\).*vitx ask"):
        read_batch(batch)
