"""What several batches hold, joined."""

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
