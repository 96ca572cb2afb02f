"""The ways back: nothing of a pass outlives them, and no value is read before they end.

On a GPU, each read would be a synchronization.
"""

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import vitx
from tests import models
from tests.modules import Around
from vitx import passes
from vitx.tape import backward
from vitx.tape.grid import Grid

KINDS = {
    "deit": models.deit,
    "deit without fused attention": models.without_fused_attention,
    "deit3": lambda: models.FAMILIES["deit3"].build(),
    "Swin": models.swin,
    "siglip": lambda: models.FAMILIES["siglip"].build(),
}


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Remove what reads values after the computation: the grid, the checks, and the comparison of buffers."""
    monkeypatch.setattr(Grid, "map", lambda grid, pixels, tokens: pixels)
    monkeypatch.setattr(backward, "check", lambda *_, **__: None)
    monkeypatch.setattr(passes, "_check_map", lambda *_: None)
    monkeypatch.setattr(torch, "equal", lambda *_: True)  # of buffers, see `vitx.models.isolation`


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_values_can_be_explained(kind, method, nothing_is_read):
    """A `meta` tensor has no values: reading one, or making a tensor on the CPU, would raise an error."""
    model = KINDS[kind]().to("meta").eval()
    images = torch.empty(2, 3, 32, 32, device="meta")
    found = vitx.explain(model, images, method, target=1)
    assert found.maps.device.type == "meta"
    assert found.maps.shape == (2, 32, 32)


def test_a_read_in_the_middle_would_be_seen(nothing_is_read):
    reads = Around(lambda inner, x: inner(x if bool((x == x).all()) else -x), models.deit())
    with pytest.raises(Exception, match=r"[Mm]eta"):
        vitx.explain(reads.to("meta").eval(), torch.empty(2, 3, 32, 32, device="meta"))


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence", "attention", "legrad"])
def test_nothing_of_a_pass_outlives_it(method):
    """All memory is freed before the garbage collector runs; else a training would need twice as much."""
    model, seen = models.deit().eval(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            keep = lambda _, __, out: seen.append(StorageWeakRef(out.untyped_storage()))  # noqa: E731
            module.register_forward_hook(keep)
    gc.collect()
    gc.disable()
    try:
        vitx.explain(model, models.FAMILIES["deit"].images(), method, target=1)
        assert len(seen) > 12
        assert all(storage.expired() for storage in seen)
    finally:
        gc.enable()
