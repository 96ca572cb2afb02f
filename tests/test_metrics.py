import math

import pytest
import torch

from vitx import metrics


def test_entropy_of_hand_worked_maps():
    maps = torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], [[3.0, 3.0], [3.0, 3.0]]])
    expected = torch.tensor([0.0, math.log(2) / math.log(4), 1.0])
    assert torch.allclose(metrics.entropy(maps), expected)
    assert metrics.entropy(torch.zeros(1, 2, 2)).tolist() == [1.0]


def test_drift_is_blind_to_scale_and_largest_for_disjoint_maps():
    a = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    b = torch.tensor([[[0.0, 0.0], [5.0, 1.0]]])
    assert metrics.drift(a, 7 * a).item() == pytest.approx(0, abs=1e-6)
    assert metrics.drift(a, b).item() == pytest.approx(1)
    half = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    one = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert metrics.drift(half, one).item() == pytest.approx(1 - math.sqrt(0.5))


def test_pointing_game_takes_the_brightest_point():
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 3] = maps[1, 3, 0] = 1
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, :8, 24:] = True
    assert metrics.pointing_game(maps, masks).tolist() == [1.0, 0.0]


def test_energy_is_the_share_inside():
    maps = torch.ones(1, 4, 4)
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    assert metrics.energy_inside(maps, masks).item() == pytest.approx(1 / 4)
    maps[:, 1:] = 0
    assert metrics.energy_inside(maps, masks).item() == pytest.approx(1)
    assert metrics.energy_inside(torch.zeros(1, 4, 4), masks).item() == pytest.approx(1 / 4)
