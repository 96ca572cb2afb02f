import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from vitx import VitxError
from vitx.watch.data_sets import class_names, names_in, one_of_each_class
from vitx.watch.settings import Settings

LABELS = [3, 3, 0, 1, 0, 3, 1, 4]


class Plain(Dataset):
    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, index):
        raise AssertionError("no sample needs to be loaded")


def never(places):
    raise AssertionError("no label needs to be read")


SETS = {
    "targets": Plain(targets=LABELS),
    "targets as a tensor": Plain(targets=torch.tensor(LABELS)),
    "labels": Plain(labels=tuple(LABELS)),
    "_labels": Plain(_labels=LABELS),
    "tensors": TensorDataset(torch.rand(8, 1), torch.tensor(LABELS)),
}


@pytest.mark.parametrize("data", SETS.values(), ids=SETS)
def test_one_of_each_class_without_loading(data):
    assert one_of_each_class(data, 8, never) == (2, 3, 0, 7)


def test_of_a_subset():
    assert one_of_each_class(Subset(Plain(targets=LABELS), range(7, -1, -1)), 8, never) == (3, 1, 2, 0)


def test_of_many_classes_evenly_spaced_ones():
    assert one_of_each_class(Plain(targets=LABELS), 2, never) == (3, 7)


@pytest.mark.parametrize("attributes", [{}, {"targets": ["a"] * 8}, {"labels": [1, 2]}])
def test_reads_labels_where_the_data_set_does_not_list_them(attributes):
    read = []

    def labels(places):
        for place in places:
            read.append(place)
            yield LABELS[place]

    chosen = one_of_each_class(Plain(**attributes), 3, labels)
    assert len({LABELS[place] for place in chosen}) == 3
    assert len(read) < len(LABELS), "three classes were found before the end"
    assert chosen == one_of_each_class(Plain(**attributes), 3, labels), "not the same in every run"


def test_of_three_tensors_none_is_taken_for_the_labels():
    cameras = TensorDataset(torch.rand(8, 1), torch.arange(8) % 2, torch.tensor(LABELS))
    chosen = one_of_each_class(cameras, 8, lambda places: (LABELS[place] for place in places))
    assert sorted(LABELS[place] for place in chosen) == [0, 1, 3, 4]


def test_needs_classes():
    with pytest.raises(VitxError, match="needs a class for each sample"):
        one_of_each_class(Plain(), 3, lambda places: [None])


@pytest.mark.parametrize(
    "names", [["cat", "owl"], {1: "owl", 0: "cat"}, {"1": "owl", "0": "cat"}, {"owl": 1, "cat": 0}]
)
def test_names_that_are_given(names):
    assert names_in(names) == ("cat", "owl")


@pytest.mark.parametrize("names", ["names.txt", {"cat": 120, "owl": 80}, 3])
def test_what_is_given_and_holds_no_names(names):
    with pytest.raises(VitxError, match="class_names must be a list of names, or a mapping"):
        Settings(class_names=names)


class Feature:
    names = ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (Plain(classes=["cat", "dog"]), ("cat", "dog")),
        (Plain(classes=[("tench", "Tinca tinca"), ("goldfish",)]), ("tench", "goldfish")),
        (Plain(features={"image": object(), "label": Feature()}), ("cat", "dog")),
        (Plain(features={"kind": Feature()}), ("cat", "dog")),
        (Plain(features={"coarse": Feature(), "label": Feature()}), ("cat", "dog")),
        (Plain(features={"coarse": Feature(), "fine": Feature()}), None),
        (Subset(Subset(Plain(classes=["cat"]), [0]), [0]), ("cat",)),
        (ConcatDataset([Plain(classes=["cat"]), Plain()]), ("cat",)),
        (Plain(classes=["cat", "owl"], class_to_idx={"owl": 0, "cat": 1}), ("owl", "cat")),
        (Plain(classes=["cat", "owl"], class_to_idx={"cat": 0, "owl": 1, "feline": 0}), ("cat", "owl")),
        (Plain(class_to_idx={"1": 0, "0": 1}), ("1", "0")),
        (Plain(classes={"cat": 120, "owl": 80}), None),
        (Plain(classes={"cat": 1, "owl": 2}), None),
        (Plain(), None),
    ],
)
def test_class_names(data, names):
    assert class_names(data) == names
