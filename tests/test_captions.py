"""What is said of an image."""

import pytest
import torch

from vitx.captions import Caption, captions_of


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

    @pytest.mark.parametrize("logits", [[[1.234], [-0.5]], [1.234, -0.5]])
    @pytest.mark.parametrize("labels", [[1.0, 2.5], [[1.0], [2.5]]])
    def test_numbers(self, logits, labels):
        assert self.said(logits, labels) == ["1.23, is 1", "-0.5, is 2.5"]

    def test_labels_of_another_kind_are_left_out(self):
        for labels in ([0.5, 1.5], [[1, 2, 3, 4], [1, 2, 3, 4]], [[[1]], [[2]]]):
            assert self.said([[0.0, 3.0], [0.0, 3.0]], labels) == ["1 95%", "1 95%"]

    def test_outputs_that_are_no_classes_have_no_caption(self):
        assert [str(caption) for caption in captions_of(torch.rand(2, 4, 5))] == ["", ""]
