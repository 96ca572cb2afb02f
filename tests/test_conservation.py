"""The conservation check of every map."""

import pytest
import torch

from tests import models
from vitx import VitxError, explain
from vitx.tape.conservation import check, check_score, share_of_images, share_of_sum


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def test_what_the_own_tokens_have_makes_up_what_each_image_lacks():
    found = share_of_images(numbers(0.5, 0.75), number(0.75))
    torch.testing.assert_close(found, numbers(1, 1))
    found = share_of_images(numbers(0.5, 0.75), number(0.375))  # half of what is missing
    torch.testing.assert_close(found, numbers(0.75, 0.875))
    torch.testing.assert_close(share_of_images(numbers(1, 1), number(0.0)), numbers(1, 1))


def test_what_layers_added_is_expected():
    """How much they add is known only for all images together, not for each of them."""
    found = explain(models.built("deit"), models.FAMILIES["deit"].images(), "gae", target=1)
    torch.testing.assert_close(found.conservation, torch.ones(2))


def test_a_score_is_judged_by_the_size_of_its_parts():
    """An error of 0.1 is rounding if 2 = 1000.5 - 998.5, but much for a 2 from small parts."""
    share = share_of_sum(number(2.0), number(2.1), number(1999.0))
    assert share.item() == pytest.approx(1 + 0.1 / 1999)
    check_score(share, torch.float32)
    with pytest.raises(VitxError, match=r"^105.0% of the score was accounted for .* or rounding is to blame"):
        check_score(share_of_sum(number(2.0), number(2.1), number(2.0)), torch.float32)


def test_a_double_model_has_no_rounding_to_blame():
    with pytest.raises(VitxError, match=r"whose part in the score is not known$"):
        check_score(numbers(0.5), torch.float64)


def test_half_precision_rounds_more():
    check_score(numbers(1.01), torch.bfloat16)
    with pytest.raises(VitxError):
        check_score(numbers(1.01), torch.float32)


def test_a_score_of_nothing():
    assert share_of_sum(number(0.0), number(0.0), number(0.0)).item() == 1


@pytest.mark.parametrize("share", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite(share):
    with pytest.raises(VitxError):
        check_score(numbers(share), torch.float32)


GOOD = {"conservation": numbers(1, 1), "pixels": torch.rand(2, 4, 4), "own": numbers(0, 0.1), "lost": {}}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"conservation": numbers(1, 0.9)}, "^90.0% of the relevance arrived"),
        ({"conservation": numbers(1.2, 1)}, "^120.0% of the relevance arrived"),
        ({"lost": {"a": 0.1, "b": 0.2}}, "^20.0% of the relevance reached b, and no rule"),
        ({"pixels": torch.full((2, 4, 4), -0.5)}, r"below 0 was found \(-0.5\)"),
        ({"own": numbers(0, -0.25)}, r"below 0 was found \(-0.25\)"),
        ({"conservation": numbers(1, torch.nan)}, "own tokens is not finite"),
    ],
)
def test_what_is_wrong_is_said(wrong, sentence):
    check(**GOOD, positive=True)
    with pytest.raises(VitxError, match=sentence) as error:
        check(**{**GOOD, **wrong}, positive=True)
    assert "\n" not in str(error.value)


def test_what_may_be_below_0():
    check(**{**GOOD, "pixels": torch.full((2, 4, 4), -0.5)}, positive=False)


def test_rounding_is_no_error():
    small = {"conservation": numbers(1, 1.0005), "pixels": torch.full((2, 4, 4), -1e-7), "lost": {"a": 1e-4}}
    check(**{**GOOD, **small}, positive=True)
