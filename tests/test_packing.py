"""Compact packing of attention matrices."""

import base64

import numpy as np
import pytest
import torch

from vitx.viewer.page import most_bytes, packed


def read(part, kind):
    """Read numbers of a kind from base64, as the page does."""
    return np.frombuffer(base64.b64decode(part), kind)


@pytest.mark.parametrize("sizes", [2.0 ** -torch.arange(8), 1.4 ** -torch.arange(4, 12)])
def test_a_is_packed_within_a_600th(sizes):
    """log A is packed as two thin matrices if that is exact and smaller; otherwise A is packed whole."""
    torch.manual_seed(0)
    plain = torch.softmax(torch.randn(2, 3, 90, 8) * sizes @ torch.randn(2, 3, 8, 90), -1)
    thin = packed(plain, 8)
    assert thin["columns"] == 9
    units = read(thin["units"], "<f4").reshape(6, 1, -1)
    left, right = (read(thin[side], "<i2").reshape(6, 90, -1) for side in ("left", "right"))
    logs = (left * units @ right.swapaxes(1, 2)).reshape(plain.shape)
    assert np.abs(logs - plain.log().numpy()).max() <= 1 / 600
    assert sum(len(thin[part]) for part in ("units", "left", "right")) < most_bytes(plain.shape, 8)
    masked = plain.tril()
    for one in (masked, plain[..., :20, :20], -plain):
        assert "whole" in packed(one, 8)
