"""Relevance follows the forward pass of models of all kinds; calls without a rule are named."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import models, oracle
from tests.kinds import KINDS
from tests.modules import Around
from tests.plain_vits import IMAGES, WIDTH, Vit, vit
from vitx import explain, explain_methods


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_accounts_for_all_relevance(kind):
    build, size, grid = KINDS[kind]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    model, asked = build().eval(), {method: {} for method in ("grad_rollout", "gae", "evidence")}
    explanations = {"rollout": explain(model, images), **explain_methods(model, images, asked)}
    for method, found in explanations.items():
        assert (found.conservation - 1).abs().max() < 1e-3, method
        assert grid is None or tuple(found.maps.shape[1:]) == grid, method
        assert (found.maps.flatten(1).std(1) > 0).all(), method
    maps = explanations["rollout"].maps
    assert maps.min() >= -1e-6
    assert (maps.sum((1, 2)) <= 1 + 1e-3).all()


def wanted(method, **options):
    """Return the map of the plain model, computed from full matrices."""
    plain = vit("einsum with an ellipsis")
    seen = oracle.observe(plain, IMAGES)
    return oracle.maps_of(seen, method, 1, "token", **options)


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
@pytest.mark.parametrize(
    "how",
    [
        *("fused", "einsum of a list", "einsum with an ellipsis", "einsum, values first"),
        "einsum, channels by two letters",
        *("bmm, heads in the batch", "baddbmm", "fused, heads in the batch", "fused, a window dimension"),
        *("out= and a buffer", "a softmax by hand", "a copy of A is kept, and one beside"),
    ],
)
def test_attention_however_it_is_written(how, method):
    for options in ({}, {"fusion": "max", "discard": 0.4}):
        named = {{"fusion": "head_fusion", "discard": "discard_ratio"}[k]: v for k, v in options.items()}
        found = explain(vit(how), IMAGES, method, **named)
        assert oracle.relative_error(found.maps, wanted(method, **options)) < 1e-9


def pooled_by_softmax(tokens):
    """Pool tokens as CCT does, with one weight for each token and no dimension of heads."""
    return torch.einsum("bn,bnd->bd", tokens.mean(2).softmax(1), tokens)


READS = {
    "token": (lambda tokens: tokens[:, 0], "token"),
    "the first of a cumulative sum": (lambda tokens: tokens.cumsum(1)[:, 0], "token"),
    "the last of a cumulative sum": (lambda tokens: tokens.cumsum(1)[:, -1], "all"),
    "patches": (lambda tokens: tokens[:, 1:].mean(1), "patches"),
    "all": (lambda tokens: tokens.mean(1), "all"),
    "sum of a stack": (
        lambda tokens: torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)]).sum(0),
        "token+patches",
    ),
    "sequences of one length": (
        lambda tokens: nn.utils.rnn.pad_sequence(list(tokens[:, 1:]), batch_first=True).mean(1),
        "patches",
    ),
}


@pytest.mark.parametrize("method", ["rollout", "grad_rollout"])
@pytest.mark.parametrize("name", READS)
def test_what_the_head_reads_is_seen(name, method):
    read, kind = READS[name]
    model = vit(read=read)
    slow = vit("einsum with an ellipsis", read)
    maps = oracle.maps_of(oracle.observe(slow, IMAGES), method, 1, kind)
    assert oracle.relative_error(explain(model, IMAGES, method).maps, maps) < 1e-9


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
def test_a_path_that_autograd_does_not_see_is_followed(method):
    found = explain(vit(read=lambda tokens: tokens.detach()[:, 0]), IMAGES, method, target=1)
    assert oracle.same(found, explain(vit(), IMAGES, method, target=1), 1e-9)


def test_a_softmax_over_tokens_pools_them():
    found = explain(vit(read=pooled_by_softmax), IMAGES)
    model = vit("einsum with an ellipsis")
    seen, tokens = oracle.observe(model, IMAGES), model.tokens(IMAGES)
    for image in range(2):
        layers = [oracle.fuse(a[image], "mean") for a in seen.attentions]
        row = (tokens[image].mean(1).softmax(0) @ oracle.rollout(layers)).detach()
        assert (found.maps[image].flatten() - row[1:]).abs().max() < 1e-9 * row.max()


def test_patches_that_overlap_are_cut_out_again():
    """The image is unfolded with padding and folded back, as T2T and VOLO do."""

    def around(x):
        patches = F.unfold(x, 3, padding=1, stride=1)
        return F.fold(patches, x.shape[2:], 3, padding=1) / 9

    found = explain(Around(lambda vit, x: vit(around(x)), vit()), IMAGES)
    assert torch.allclose(found.conservation, torch.ones(2, dtype=torch.float64))
    plain = explain(vit(), around(IMAGES)).maps
    assert torch.corrcoef(torch.stack([found.maps.flatten(), plain.flatten()]))[0, 1] > 0.9


def test_a_picture_that_is_turned_on_the_way_comes_out_right():
    turned = explain(Around(lambda vit, x: vit(x.transpose(2, 3).flip(3)), vit()), IMAGES).maps
    plain = explain(vit(), IMAGES.transpose(2, 3).flip(3)).maps
    assert torch.allclose(turned, plain.flip(2).transpose(1, 2), rtol=1e-9)


def test_padding_inside_the_model_moves_nothing():
    small = IMAGES[:, :, 8:, 8:]
    found = explain(Around(lambda vit, x: vit(F.pad(x, (8, 0, 8, 0))), vit()), small)
    plain = explain(vit(), F.pad(small, (8, 0, 8, 0))).maps[:, 1:, 1:]
    assert torch.allclose(found.maps, plain, rtol=1e-9)
    assert torch.allclose(found.conservation, torch.ones(2, dtype=torch.float64))


def test_two_models_share_what_is_read():
    def ensemble(one, other, x):
        with torch.no_grad():
            other(x.flip(3))  # as a teacher
        return one(x) + other(x)

    parts = vit(), vit(read=lambda tokens: tokens.mean(1))
    half = sum(explain(one, IMAGES).maps for one in parts) / 2
    assert torch.allclose(explain(Around(ensemble, *parts), IMAGES).maps, half, rtol=1e-9)


def test_crops_of_an_image_are_added():
    crops = Around(lambda vit, x: vit(torch.cat([x, x.flip(3)])).view(2, len(x), -1).mean(0), vit())
    found = explain(crops, IMAGES)
    flipped = explain(vit(), IMAGES.flip(3)).maps.flip(2)
    assert torch.allclose(found.maps, (explain(vit(), IMAGES).maps + flipped) / 2, rtol=1e-9)


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "gae", "evidence"])
def test_a_scripted_module_is_followed(method):
    class Scripted(Vit):
        def __init__(self, script):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
            if script:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.inner = torch.jit.script(self.inner)

        def tokens(self, x):
            tokens = super().tokens(x)
            return tokens + self.inner(tokens)

    plain, scripted = (models.spread(Scripted(script)).double().eval() for script in (False, True))
    wanted = explain(plain, IMAGES, method, target=1)
    for _ in range(3):  # torch optimizes it after two runs
        found = explain(scripted, IMAGES, method, target=1)
        assert oracle.same(found, wanted, 1e-9)
        assert (found.conservation - 1).abs().max() < 1e-6


def test_tokens_that_are_merged_share_what_they_became():
    """The last token is merged into the first patch before any attention, as in token merging."""

    class Merging(Vit):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def tokens(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            target = torch.zeros(len(x), 1, WIDTH, dtype=torch.long)
            merged = tokens[:, :-1].scatter_reduce(1, target, tokens[:, -1:], reduce=self.size)
            return merged + self.layers[0](self.norms[0](merged))

    for how in ("mean", "sum"):
        model = models.spread(Merging(how)).double().eval()
        model.read = lambda tokens: tokens.mean(1)
        found = explain(model, IMAGES)
        assert torch.allclose(found.maps[:, 0, 0], found.maps[:, 3, 3], rtol=1e-12)
        assert torch.allclose(found.maps.sum((1, 2)), torch.ones(2, dtype=torch.float64))


def test_the_output_is_the_same_to_the_last_bit():
    for method in ("rollout", "grad_rollout"):
        for name in ("deit without fused attention", "beit", "hf vit, eager"):
            model, images = models.built(name), models.FAMILIES[name].images()
            with torch.no_grad():
                plain = model(images)
            logits = plain if isinstance(plain, torch.Tensor) else plain.logits
            assert torch.equal(explain(model, images, method).logits, logits)


@pytest.mark.parametrize("size", [3, 1])
def test_a_transposed_convolution_shares_among_what_reaches_each_pixel(size):
    """It has two groups. A size of 3 overlaps, as in decoders and FPNs; a size of 1 misses pixels."""
    torch.manual_seed(0)

    up = nn.ConvTranspose2d(WIDTH, 4, size, 2, size // 2, output_padding=1, groups=2).double()

    def enlarged(inner, up, x):
        return up(inner.tokens(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))).flatten(1)

    reach = np.zeros((8, 8, 4, 4))  # 1 where an output pixel comes from a token
    for r, c, down, right in itertools.product(range(4), range(4), range(size), range(size)):
        y, x = 2 * r + down - size // 2, 2 * c + right - size // 2
        if 0 <= y < 8 and 0 <= x < 8:
            reach[y, x, r, c] = 1
    share = reach / reach.sum((2, 3), keepdims=True).clip(1)
    row = torch.from_numpy(share.sum((0, 1)) / 64).flatten()
    assert share.sum() == (64 if size == 3 else 16)
    seen = oracle.observe(vit("einsum with an ellipsis"), IMAGES)
    for image, found in enumerate(explain(Around(enlarged, vit(), up), IMAGES).maps):
        rollout = oracle.rollout([oracle.fuse(a[image], "mean") for a in seen.attentions])
        read = torch.cat([torch.zeros(1, dtype=torch.float64), row])
        assert (found.flatten() - (read @ rollout)[1:]).abs().max() < 1e-9


BY_NAME = {
    "mean": lambda x: torch.mean(input=x, dim=1, keepdim=True) + 0 * x,
    "where": lambda x: torch.where(torch.ones_like(x).bool(), input=x, other=-x),
    "cat": lambda x: torch.cat(tensors=[x, x], dim=1),
    "linear": lambda x: F.linear(input=x, weight=torch.eye(WIDTH, dtype=x.dtype)),
    "add": lambda x: torch.add(input=x, other=x, alpha=2),
    "mul": lambda x: torch.mul(x, other=x.sigmoid()),
    "matmul": lambda x: torch.matmul(input=x, other=torch.eye(WIDTH, dtype=x.dtype)),
    "pad": lambda x: F.pad(input=x, pad=(0, 0, 0, 1)),
    "conv1d": lambda x: F.conv1d(input=x.mT, weight=torch.eye(WIDTH, dtype=x.dtype)[:, :, None]).mT,
    "softmax": lambda x: torch.softmax(input=x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=(WIDTH,)),
    "gelu": lambda x: F.gelu(input=x),
    "transpose": lambda x: torch.transpose(input=x, dim0=0, dim1=1).transpose(0, 1),
    "addmm": lambda x: torch.addmm(
        input=torch.zeros(WIDTH, dtype=x.dtype), mat1=x.flatten(0, 1), mat2=torch.eye(WIDTH, dtype=x.dtype)
    ).view_as(x),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_operands_given_by_name(name):
    found = explain_methods(
        vit(read=lambda x: BY_NAME[name](x)[:, 0]), IMAGES, ["rollout", "evidence"], target=0
    )
    assert all((one.conservation - 1).abs().max() < 1e-6 for one in found.values())
