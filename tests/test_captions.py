"""Captions of images."""

import pytest
import torch

from vitx.pictures.captions import Caption, captions_of


class TestCaption:
    def test_right(self):
        caption = Caption("cat", 0.874, "cat", right=True)
        assert caption.right is True
        assert str(caption) == "✓ cat 87%"

    def test_wrong_names_the_label(self):
        caption = Caption("dog", 0.5, "cat", right=False)
        assert caption.right is False
        assert str(caption) == "✗ dog 50%, is cat"

    def test_without_a_label(self):
        caption = Caption("dog", 1.0)
        assert caption.right is None
        assert str(caption) == "dog 100%"


class TestCaptions:
    def said(self, logits, labels, names=None):
        return [str(caption) for caption in captions_of(torch.tensor(logits), torch.tensor(labels), names)]

    def test_one_class(self):
        logits, names = [[0.0, 3.0], [1.0, 0.0]], ["cat", "dog"]
        assert self.said(logits, [1, 1], names) == ["✓ dog 95%", "✗ cat 73%, is dog"]

    def test_one_hot_labels_are_one_class(self):
        assert self.said([[0.0, 3.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]) == ["✓ 1 95%", "✗ 0 73%, is 1"]

    def test_one_logit_is_yes_or_no(self):
        logits, names = [[3.0], [-1.0]], ["healthy", "ill"]
        assert self.said(logits, [1, 1], names) == ["✓ ill 95%", "✗ healthy 73%, is ill"]

    def test_several_classes(self):
        logits = [[2.0, 1.0, -3.0], [-1.0, -1.0, -1.0], [2.0, -1.0, -1.0]]
        labels = [[1, 1, 0], [0, 0, 0], [1, 0, 1]]
        assert self.said(logits, labels, ["a", "b", "c"]) == ["✓ a + b", "✓ none", "✗ a, is a + c"]

    def test_smoothed_labels_of_several_classes(self):
        soft = torch.tensor([[0.95, 0.5, 0.05]])
        assert str(captions_of(torch.tensor([[2.0, -1.0, -3.0]]), soft, kind="classes")[0]) == "✗ 0, is 0 + 1"

    def test_numbers_without_labels(self):
        for kind in ("numbers", "shares"):
            numbers = torch.tensor([[0.25], [0.5]])
            found = captions_of(numbers.logit() if kind == "shares" else numbers, None, kind=kind)
            assert [str(caption) for caption in found] == ["0.250", "0.500"]

    @pytest.mark.parametrize("logits", [[[1.234], [-0.5]], [1.234, -0.5]])
    @pytest.mark.parametrize("labels", [[1.0, 2.5], [[1.0], [2.5]]])
    def test_numbers(self, logits, labels):
        assert self.said(logits, labels) == ["1.23, is 1.00", "-0.50, is 2.50"]

    @pytest.mark.parametrize(
        ("found", "labels", "said"),
        [
            ([[312_345.6], [99.5]], [312_000.0, 1500.0], ["312346, is 312000", "100, is 1500"]),
            ([[0.01234], [2.0]], [0.02, 0.001], ["0.0123, is 0.0200", "2.0000, is 0.0010"]),
            ([[1e-9], [1.0]], [2e-9, 1e-9], ["1.00e-09, is 2.00e-09", "1.00e+00, is 1.00e-09"]),
            ([[31.4], [7.0]], [30, 8], ["31.4, is 30.0", "7.0, is 8.0"]),
            (
                [[0.1, 0.2], [3.0, 4.0]],
                [[0.5, 0.25], [1.0, 2.0]],
                ["0.10, 0.20, is 0.50, 0.25", "3.00, 4.00, is 1.00, 2.00"],
            ),
        ],
    )
    def test_the_labels_say_on_which_scale_numbers_are_written(self, found, labels, said):
        assert self.said(found, labels) == said

    def test_labels_of_another_kind_are_left_out(self):
        for labels in ([[1, 2, 3, 4], [1, 2, 3, 4]], [[[1]], [[2]]], [-1, -1]):
            assert self.said([[0.0, 3.0], [0.0, 3.0]], labels) == ["1 95%", "1 95%"]

    @pytest.mark.parametrize("labels", [[0.5, 1.5], [0, 7]])
    def test_of_features_nothing_is_said(self, labels):
        assert self.said([[0.0, 3.0], [0.0, 3.0]], labels) == ["", ""]

    def test_outputs_that_are_no_classes_have_no_caption(self):
        assert [str(caption) for caption in captions_of(torch.rand(2, 4, 5))] == ["", ""]

    @pytest.mark.parametrize("labels", [[0.0, 1.0], [[0.0], [1.0]]])
    def test_floats_of_one_logit_are_two_classes(self, labels):
        said = captions_of(torch.tensor([[2.0], [-2.0]]), torch.tensor(labels), ["healthy", "ill"])
        assert [str(one) for one in said] == ["✗ ill 88%, is healthy", "✗ healthy 88%, is ill"]


class TestRoom:
    """Captions that must fit into a given number of characters."""

    NAMES = ("Cardiomegaly", "Effusion", "Pneumonia", "Pneumothorax")

    def lines(self, caption, letters):
        return caption.lines(lambda text: len(text) <= letters)

    def test_what_fits_stays(self):
        caption = Caption("dog", 0.5, "cat", right=False)
        assert self.lines(caption, 19) == [str(caption)]

    def test_long_names_are_shortened_in_the_middle_and_the_truth_last(self):
        caption = Caption("greater swiss mountain dog", 0.5, "affenpinscher", right=False)
        assert self.lines(caption, 40) == ["✗ greater …ain dog 50%, is affenpinscher"]
        assert self.lines(caption, 20) == ["✗ greater…n dog 50%,", "is affenpinscher"]
        assert self.lines(caption, 10) == ["✗ gr…g 50%,", "is af…r"]

    def test_several_classes_take_several_lines(self):
        caption = Caption(" + ".join(self.NAMES), None, "Pneumonia + Effusion", right=False)
        whole = ["✗ Cardiomegaly + Effusion +", "Pneumonia + Pneumothorax,", "is Pneumonia + Effusion"]
        assert self.lines(caption, 28) == whole
        assert self.lines(caption, 14)[-2:] == ["is Pneumonia +", "Effusion"]
        assert self.lines(caption, 14)[0] == "✗ 4 classes,"
