"""What is left of weights that are made random."""

import pytest
import torch
from torch import nn

from vitx.evaluation.randomization import randomize


def test_only_the_moments_stay():
    before = nn.Parameter(3 + 0.2 * torch.randn(100, 100))
    after = nn.Parameter(before.detach().clone())
    randomize([after], torch.Generator())
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=0.01)
    assert after.std().item() == pytest.approx(before.std().item(), abs=0.01)
    both = torch.stack([before.detach().flatten(), after.detach().flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


def test_what_tells_nothing_apart_stays():
    tensors = [nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.full((5,), 0.7))]
    randomize(tensors, torch.Generator())
    assert torch.allclose(tensors[1], torch.tensor(0.7))
    assert tensors[0].item() == 2


def test_a_variance_stays_above_zero():
    variance = torch.tensor([1e-4, 5.0, 7.0])
    randomize([variance], torch.Generator())
    assert torch.allclose(variance, torch.tensor(4.0))


def test_half_precision():
    weights = nn.Parameter(torch.randn(50, 50).to(torch.bfloat16))
    randomize([weights], torch.Generator())
    assert weights.dtype == torch.bfloat16
    assert weights.isfinite().all()
