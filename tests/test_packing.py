"""A in few bytes."""

import torch

from vitx.viewer.packing import most_bytes, packed


def test_a_is_packed_within_a_600th():
    """Thin matrices where A has the rank of queries and keys, else A itself."""
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
