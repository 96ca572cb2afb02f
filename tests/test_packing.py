"""Compact packing of attention matrices."""

import torch

from vitx.viewer.packing import most_bytes, packed


def test_a_is_packed_within_a_600th():
    """log A is packed as two thin matrices if that is exact and smaller; otherwise A is packed whole."""
    torch.manual_seed(0)
    plain = torch.softmax(torch.randn(2, 3, 90, 8) @ torch.randn(2, 3, 8, 90), -1)
    thin = packed(plain, 8)
    assert thin["fine"] <= 9
    assert sum(len(part) for part in (thin["units"], *thin["left"], *thin["right"])) < most_bytes(
        plain.shape, 8
    )
    masked = plain.tril()
    for one in (masked, plain[..., :20, :20], -plain):
        assert "whole" in packed(one, 8)
