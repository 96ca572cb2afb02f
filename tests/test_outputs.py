"""Kinds of outputs: a class, several classes, numbers, shares or features."""

import pytest
import timm
import torch
from transformers import ViTConfig, ViTForImageClassification

from vitx.models.outputs import declared_classes, kind_of, told_apart


@pytest.mark.parametrize(
    ("shape", "labels", "widths", "declared", "kind"),
    [
        ((4, 10), None, None, (), "class"),
        ((4, 10), [0, 9, 3, 3], None, (), "class"),
        ((4, 10), [0, 9, 3, 3], range(10, 11), (), "class"),
        ((4, 10), [0, 9, 3, 10], None, (), "features"),
        ((4, 384), [0, 9, 3, 3], range(10, 11), (), "features"),
        ((4, 1000), [0, 9, 3, 3], range(10, 11), (1000,), "class"),
        ((4, 1000), [0, 217, 482, 3], range(10, 11), (), "class"),  # only some classes have names
        ((4, 12), [0, 9, 3, 3], range(10, 21), (), "class"),
        ((4, 2), [0, 0, 0, -1], None, (), "class"),
        ((4, 1), [0, 1, 1, 0], range(2, 3), (), "class"),
        ((4,), [0.0, 1.0, 1.0, 0.0], None, (), "class"),
        ((4, 1), [30, 41, 5, 0], None, (), "numbers"),
        ((4, 1), [[0.5], [1.5], [2.0], [0.0]], None, (1,), "numbers"),
        ((4, 2), [[0.5, 7], [1.5, 7], [2.0, 7], [0.0, 7]], None, (), "numbers"),
        ((4, 2), [[0.5, 0.5], [1.0, 0.0], [0.1, 0.9], [0.0, 1.0]], None, (), "class"),
        ((4, 2), [[1, 1], [0, 0], [0, 1], [0, 1]], None, (), "classes"),
        ((4, 24), [0.5, 1.5, 2.0, 0.0], None, (), "features"),
        ((4, 17, 24), [0, 1, 2, 0], None, (), "features"),
    ],
)
def test_labels_tell(shape, labels, widths, declared, kind):
    given = None if labels is None else torch.tensor(labels)
    assert kind_of(torch.rand(shape), given, widths, frozenset(declared)) == kind
    assert kind_of(torch.rand(shape)[:1], given, widths, frozenset(declared)) == kind, "one image is enough"


@pytest.mark.parametrize(
    ("kind", "width", "labels", "told"),
    [
        ("class", 1, [0.0, 1.0, 1.0], "class"),
        ("class", 1, [[0.35], [1.0], [0.0]], "shares"),
        ("class", 1, [0, 1, 1], "class"),
        ("class", 1, [0.0, 1.0, float("nan")], "class"),
        ("class", 3, [[0.1, 0.1, 0.8]], "class"),
        ("shares", 1, [0.0, 1.0, 1.0], "class"),
        ("shares", 2, [[0.0, 1.0], [1.0, 1.0]], "classes"),
        ("shares", 2, [[0.25, 1.0], [1.0, 1.0]], "shares"),
        ("numbers", 1, [0.5, 1.5], "numbers"),
    ],
)
def test_shares_are_no_yes_and_no(kind, width, labels, told):
    assert told_apart(kind, width, torch.tensor(labels)) == told
    assert told_apart(kind, width, None) == kind


def test_what_models_declare():
    assert set(declared_classes(timm.create_model("test_vit", num_classes=7))) == {7}
    assert not set(declared_classes(timm.create_model("test_vit", num_classes=0)))
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    assert set(declared_classes(ViTForImageClassification(ViTConfig(num_labels=5, **small)))) == {5}
