"""The way of relevance through the layers."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from tests import models, oracle
from vitx import VitxError, capture, explain, gradient_rollout
from vitx.fused import SharedAttention
from vitx.propagation import propagate_gradients

IMAGES = models.FAMILIES["deit"].images()


class Watcher:
    """Keeps what it is shown: of each layer A and, if there is one, its gradient."""

    def __init__(self, images=2, tokens=17, start_layer=0):
        self.relevance = torch.zeros(images, tokens)
        self.start_layer = start_layer
        self.layers = []
        self.end_layer()

    def read(self, tile):
        part = tile.images, tile.heads, tile.rows
        for whole, found in zip(self.whole, (tile.weights, tile.gradient), strict=True):
            if found is not None:
                whole.append((part, found.clone()))

    def end_layer(self):
        self.whole = ([], [])
        self.layers.append(self.whole)

    def seen(self):
        assert self.layers[-1] == ([], [])
        return [tuple(self.joined(parts) for parts in layer) for layer in self.layers[:-1]]

    def joined(self, parts):
        if not parts:
            return None
        heads = max(part[1].stop for part, _ in parts)
        whole = torch.full((len(self.relevance), heads, *[self.relevance.shape[1]] * 2), torch.nan)
        for part, found in parts:
            assert whole[part].isnan().all()
            whole[part] = found
        return whole


def score_of(model, images, **options):
    with torch.enable_grad(), capture(model, gradients=True) as trace:
        return model(images)[:, 1].sum(), trace


@contextmanager
def attention_fused(fused):
    model = models.built("deit")
    for block in model.blocks:
        block.attn.fused_attn = fused
    try:
        yield model
    finally:
        for block in model.blocks:
            block.attn.fused_attn = True


def observed():
    return oracle.observe(models.built("deit", torch.float64), IMAGES.double(), 1)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_come_with_their_layer(fused):
    with attention_fused(fused) as model:
        score, trace = score_of(model, IMAGES)
    assert all(isinstance(layer, SharedAttention) == fused for layer in trace.layers)
    watchers = [Watcher(), Watcher(start_layer=2)]
    propagate_gradients(trace, watchers, score)
    seen = observed()
    wanted = list(zip(seen.attentions, seen.gradients, strict=True))[::-1]
    assert [len(watcher.seen()) for watcher in watchers] == [3, 1]
    for watcher in watchers:
        for (weights, gradient), (attention, d_attention) in zip(watcher.seen(), wanted, strict=False):
            assert torch.allclose(weights.double(), attention, atol=1e-6)
            assert torch.allclose(gradient.double(), d_attention, rtol=1e-4, atol=1e-5)


class Detached(nn.Module):
    """A model whose gradient ends after its first block, or in whose last block nothing is read."""

    def __init__(self, unread):
        super().__init__()
        self.vit = models.deit().eval()
        self.unread = unread

    def forward(self, images):
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        first, *others = self.vit.blocks
        tokens = first(tokens)
        if not self.unread:
            tokens = tokens.detach()
        for block in others:
            before, tokens = tokens, block(tokens)
        return self.vit.forward_head(self.vit.norm(before if self.unread else tokens))


@pytest.mark.parametrize("unread", [True, False])
def test_layers_without_a_gradient_are_not_shown(unread):
    score, trace = score_of(Detached(unread), IMAGES)
    watcher = Watcher()
    propagate_gradients(trace, [watcher], score)
    assert len(watcher.seen()) == 2
    score, trace = score_of(Detached(unread), IMAGES)
    wanted = trace.gradients(score)
    assert [bool(gradient.any()) for gradient in wanted] == (
        [True, True, False] if unread else [False, True, True]
    )


def test_a_layer_that_nobody_reads_is_the_identity():
    model = Detached(unread=True)
    found = explain(model, IMAGES, "grad_rollout", target=1)
    score, trace = score_of(model.double(), IMAGES.double())
    wanted = gradient_rollout(trace.attentions(), trace.gradients(score))[:, 1:]
    assert torch.allclose(found.maps.flatten(1).double(), wanted, rtol=1e-4, atol=1e-7)


def test_a_detached_path_is_said():
    for method in ("rollout", "grad_rollout"):
        with pytest.raises(VitxError, match="reached detach"):
            explain(Detached(unread=False), IMAGES, method, target=1)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_outlives_the_trace(fused):
    """Not even until the garbage collector comes: a graph holds much memory."""
    gc.collect()
    gc.disable()
    try:
        with attention_fused(fused) as model:
            score, trace = score_of(model, IMAGES)
        propagate_gradients(trace, [Watcher()], score)
        gone = [weakref.ref(trace), *map(weakref.ref, trace.layers), *map(weakref.ref, trace.outputs)]
        del score, trace
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()
