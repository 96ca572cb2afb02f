"""Comparison of targets with the same scores written by hand."""

import torch

import vitx
from tests.modules import Around

METHODS = ("rollout", "grad_rollout", "gae", "evidence", "attention")


def check(model, images, target, score, methods=METHODS):
    """Assert that the maps equal those of a model that outputs the score."""
    found = vitx.explain_methods(model, images, methods, target=target)
    by_hand = Around(lambda model, x: score(model(x))[:, None], model)
    wanted = vitx.explain_methods(by_hand, images, methods, target=1)
    for name, one in found.items():
        assert torch.allclose(one.maps, wanted[name].maps, rtol=0, atol=1e-6 * float(one.maps.max())), name
    return found
