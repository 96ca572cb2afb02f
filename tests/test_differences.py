"""The difference between two maps is drawn in red and blue."""

import torch

from vitx.pictures.render import differences


def test_red_is_more_and_blue_is_less():
    gray = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    first = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]])
    second = torch.tensor([[[2.0, 2.0], [2.0, 6.0]]])  # as shares: .5 -> .17, .17 -> .5, others equal
    drawn = differences(gray, [first], [second])[0].int()
    red, _, blue = drawn.unbind(-1)
    assert (red - blue)[-4:, -4:].min() > 60
    assert (red - blue)[:4, :4].max() < -60
    same = differences(gray, [first], [first])[0].int()
    assert (same == same[0, 0]).all()


def test_a_map_of_zeros():
    drawn = differences(
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [torch.zeros(1, 2, 2)], [torch.zeros(1, 2, 2)]
    )
    assert (drawn == drawn[0, 0, 0]).all()
