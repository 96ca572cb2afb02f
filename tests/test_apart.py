"""A large pass has its graph made in a thread of its own, and nothing else changes."""

import threading

import pytest
import torch

from tests import models
from vitx import VitxError, explain
from vitx.relevance import apart
from vitx.relevance.apart import Apart


@pytest.fixture
def large(monkeypatch):
    """Lets every pass be a large one, and notes the threads that were started."""
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(apart, "_LARGE", 1)
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), start(self))[1])
    return started


@pytest.mark.parametrize("setting", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_maps_are_the_same_and_the_thread_ends(setting, monkeypatch):
    model, images = models.swin(), torch.randn(2, 3, 32, 32)
    with setting():
        expected = explain(model, images, method="rollout").maps
        monkeypatch.setattr(apart, "_LARGE", 1)
        before = threading.active_count()
        found = explain(model, images, method="rollout").maps
    assert threading.active_count() == before
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_small_passes_and_those_with_gradients_start_no_thread(large):
    model, images = models.swin(), torch.randn(1, 3, 32, 32)
    explain(model, images, method="gae")
    assert not large
    explain(model, images, method="rollout")
    assert len(large) == 1


def test_what_is_raised_there_arrives():
    def fail():
        raise VitxError("found there")

    there = Apart(torch.empty(1, 3, 1024, 1024), gradients=False)
    try:
        assert there(threading.get_ident) != threading.get_ident()
        with pytest.raises(VitxError, match="found there"):
            there(fail)
    finally:
        there.close()
