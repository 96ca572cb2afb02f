"""Relevance in other kinds of models, compared with full N x N matrices built token by token, in float64."""

import itertools
import math

import pytest
import timm
import torch

from tests import models, visible
from vitx import explain


def seen_attentions(model, images):
    """Return a copy of the model, and A of each attention, (B or windows, N, N), averaged over its heads."""
    twin = visible.visible_twin(model)
    with visible.softmaxes() as found:
        twin(images)
    return twin, [a.detach().double().mean(1) for a in found]


def mixed(attention):
    """Return rownorm(A + I), (B, N, N)."""
    whole = attention + torch.eye(attention.shape[-1], dtype=torch.float64)
    return whole / whole.sum(-1, keepdim=True)


def check(model, images, matrices, readout, prefix=0, shared=None):
    """Compare a rollout with readout^T times the matrices, last one first.

    If patches overlap, `shared` is what each cell of the map gets when all patches have equal relevance.
    """
    maps = explain(model, images).maps
    for image, found in enumerate(maps):
        row = readout
        for matrix in reversed(matrices):
            row = row @ matrix[image]
        wanted = row[prefix:]
        if shared is not None:
            wanted = wanted / shared * wanted.sum() / (wanted / shared).sum()
        assert (found.flatten() - wanted).abs().max() < 1e-9 * wanted.max()


def evenly(count):
    return torch.full((count,), 1 / count, dtype=torch.float64)


def first_of(count):
    return torch.eye(count, dtype=torch.float64)[0]


def images_of(size):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_windows_shifts_and_merges():
    """Swin has its own masks and shifts; each merge is the mean of four tokens."""
    model, images = models.spread(models.swin()).double().eval(), images_of(32)
    twin, found = seen_attentions(model, images)
    side, matrices, rest = 16, [], iter(found)
    for stage, layer in enumerate(twin.layers):
        if stage:
            merge = torch.zeros(side * side // 4, side * side, dtype=torch.float64)
            for r, c in itertools.product(range(side), range(side)):
                merge[(r // 2) * (side // 2) + c // 2, r * side + c] = 1 / 4
            matrices.append(merge.expand(len(images), -1, -1))
            side //= 2
        for block in layer.blocks:
            attention = next(rest)
            window, shift = block.window_size[0], block.shift_size[0]
            places = torch.arange(side * side).view(side, side).roll((-shift, -shift), (0, 1))
            cells = places.view(side // window, window, side // window, window).transpose(1, 2)
            cells = cells.reshape(-1, window * window)
            whole = torch.zeros(len(images), side * side, side * side, dtype=torch.float64)
            for image, (number, cell) in itertools.product(range(len(images)), enumerate(cells)):
                whole[image][cell[:, None], cell[None]] = attention[image * len(cells) + number]
            matrices.append(mixed(whole))
    check(model, images, matrices, evenly(side * side))


def test_pooling():
    """Between the stages of PiT, a convolution pools the patches, and the class token bypasses it."""
    torch.manual_seed(0)
    model = timm.create_model("pit_ti_224", img_size=64, num_classes=models.CLASSES).double().eval()
    images = images_of(64)
    twin, found = seen_attentions(models.spread(model), images)
    side, rest = 7, iter(found)
    patches = torch.zeros(1 + side**2, 1 + 8**2, dtype=torch.float64)  # overlapping: 16 px wide, 8 px apart
    patches[0, 0] = 1
    for r, c, down, right in itertools.product(range(side), range(side), range(2), range(2)):
        patches[1 + r * side + c, 1 + (r + down) * 8 + c + right] = 1 / 4
    matrices = [patches.expand(len(images), -1, -1)]
    for stage in twin.transformers:
        if stage.pool is not None and list(stage.pool.parameters()):
            fewer = (side - 1) // 2 + 1
            pool = torch.zeros(1 + fewer**2, 1 + side**2, dtype=torch.float64)
            pool[0, 0] = 1
            for r, c in itertools.product(range(fewer), range(fewer)):
                under = [
                    (y, x)
                    for y, x in itertools.product(range(2 * r - 1, 2 * r + 2), range(2 * c - 1, 2 * c + 2))
                    if 0 <= y < side and 0 <= x < side
                ]
                for y, x in under:
                    pool[1 + r * fewer + c, 1 + y * side + x] = 1 / len(under)
            matrices.append(pool.expand(len(images), -1, -1))
            side = fewer
        matrices += [mixed(next(rest)) for _ in stage.blocks]
    assert side == 2
    assert next(rest, None) is None
    check(model, images, matrices, first_of(1 + side**2), prefix=1, shared=patches[1:, 1:].sum(0))


@pytest.mark.parametrize("beside", ["MLP", "other attentions"])
def test_attention_beside_something_else(beside):
    """Next to an MLP, attention gets everything; parallel attentions get equal shares of one residual."""
    torch.manual_seed(0)
    if beside == "MLP":
        block = timm.models.vision_transformer.ParallelScalingBlock
        model = timm.create_model(
            *("vit_tiny_patch16_224",), img_size=32, patch_size=8, depth=3, block_fn=block, num_classes=7
        )
    else:
        model = models.timm_model("vit_small_patch16_18x2_224")
    model, images = models.spread(model).double().eval(), images_of(32)
    _, found = seen_attentions(model, images)
    count = found[0].shape[-1]
    assert math.isqrt(count - 1) ** 2 == count - 1
    together = 1 if beside == "MLP" else 2
    layers = [sum(found[i : i + together]) / together for i in range(0, len(found), together)]
    check(model, images, [mixed(layer) for layer in layers], first_of(count), prefix=1)
