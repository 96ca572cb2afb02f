"""The contents of several batches, joined."""

from dataclasses import replace

import pytest
import torch

from vitx.watch.batches import Content
from vitx.watch.images import join


def content(boxes):
    inputs = {"boxes": torch.zeros(2, boxes, 4), "age": torch.tensor([boxes, boxes])}
    return Content(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), None, inputs)


def test_inputs_that_each_batch_pads_for_itself_are_left_out():
    found = join([content(boxes=1), content(boxes=3)], 3)
    assert list(found.inputs) == ["age"]
    assert found.inputs["age"].tolist() == [1, 1, 3]
    assert len(found.images) == len(found.labels) == 3


def test_inputs_of_one_shape_are_kept():
    found = join([content(boxes=2), content(boxes=2)], 4)
    assert found.inputs["boxes"].shape == (4, 2, 4)


@pytest.mark.parametrize("part", ["labels", "masks"])
@pytest.mark.parametrize("lacking", [0, 1])
def test_labels_or_masks_that_a_batch_lacks_are_left_out_and_said(part, lacking):
    batches = [replace(content(boxes=1), masks=torch.ones(2, 8, 8, dtype=torch.bool)) for _ in range(3)]
    batches[lacking] = replace(batches[lacking], **{part: None})
    found = join(batches, 5)
    assert getattr(found, part) is None
    assert [len(vars(found)[name]) for name in ("images", "labels", "masks") if name != part] == [5, 5]
    assert found.found == (f"{part}: left out, as not all batches have them",)
    assert join(batches[2:], 5).found == ()
