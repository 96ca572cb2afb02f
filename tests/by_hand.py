"""Comparison of targets with the same scores written by hand."""

import torch
from torch import nn

import vitx

METHODS = ("rollout", "grad_rollout", "gae", "evidence", "attention")


class ByHand(nn.Module):
    """A model that outputs the score as its only logit."""

    def __init__(self, model, score):
        super().__init__()
        self.model, self.score = model, score

    def forward(self, images):
        return self.score(self.model(images))[:, None]


def check(model, images, target, score, methods=METHODS):
    """Assert that the maps equal those of a model that outputs the score."""
    found = vitx.explain_methods(model, images, methods, target=target)
    wanted = vitx.explain_methods(ByHand(model, score), images, methods, target=1)
    for name, one in found.items():
        assert torch.allclose(one.maps, wanted[name].maps, rtol=0, atol=1e-6 * float(one.maps.max())), name
    return found
