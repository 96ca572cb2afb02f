"""Prefix, grid and read-out of each family."""

import pytest
import torch
from torch import nn

from tests import models, oracle
from vitx import VitxError, capture
from vitx.tokens import find_tokens

FAMILIES = sorted(models.FAMILIES)


def tokens_of(model, images):
    with torch.no_grad(), capture(model) as trace:
        model(images)
    return find_tokens(model, trace, images)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_and_grid(name):
    family = models.FAMILIES[name]
    tokens = tokens_of(models.built(name), family.images())
    assert (tokens.prefix, tokens.grid) == (family.prefix, family.grid)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_readout(name, fusion):
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    found = tokens_of(model, images).readout(fusion)
    pooling = oracle.observe(model, images, lambda logits: logits[:, 0]).pooling
    count = family.prefix + family.grid[0] * family.grid[1]
    for image in range(2):
        wanted = oracle.readout_weights(family.readout, family.prefix, count, pooling, image, fusion)
        row = found if found.ndim == 1 else found[image]
        assert torch.allclose(row, wanted, rtol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_readout_is_what_the_score_depends_on(name):
    """A query of the last layer whose attention moves the score belongs to a token that is read."""
    family = models.FAMILIES[name]
    model, images = models.built(name, torch.float64), family.images(dtype=torch.float64)
    seen = oracle.observe(model, images, lambda logits: logits[:, 0])
    read = (seen.gradients[-1][0] != 0).any(-1).any(0)
    row = tokens_of(model, images).readout("mean")
    assert torch.equal(read, (row if row.ndim == 1 else row[0]) > 0)


@pytest.mark.parametrize("name", ["Siglip", "CLIP", "ViTMSN", "IJepa", "Beit"])
def test_hugging_face_classifiers_that_pool_in_their_own_way(name):
    """Siglip's also runs an attention pooling, which its classifier does not read."""
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "intermediate_size": 48}
    if name in ("Siglip", "CLIP"):
        vision = {**size, **heads, "projection_dim": 24}
        config = getattr(transformers, f"{name}Config")(vision_config=vision)
    else:
        config = getattr(transformers, f"{name}Config")(**size, **heads)
    model = getattr(transformers, f"{name}ForImageClassification")(config).eval()
    images = torch.randn(1, 3, 32, 32)
    with capture(model, gradients=True) as trace:
        logits = model(pixel_values=images).logits
    tokens = find_tokens(model, trace, images)
    read = (trace.gradients(logits[:, 0].sum())[-1][0] != 0).any(-1).any(0)
    assert torch.equal(read, tokens.readout("mean") > 0)


def test_patches_are_cut_row_by_row():
    tokens = tokens_of(models.built("not square"), models.FAMILIES["not square"].images())
    relevance = torch.arange(16.0).expand(2, -1)
    assert tokens.patches(relevance)[1].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (16, 56), (64, 64)])
def test_grid_follows_the_input(size):
    model = models.deit(dynamic_img_size=True).eval()
    tokens = tokens_of(model, torch.randn(1, 3, *size))
    assert tokens.grid == (size[0] // 8, size[1] // 8)


@pytest.mark.parametrize(("pool", "readout"), [("token", "token"), ("avg", "patches")])
def test_pooling_is_read_from_the_model(pool, readout):
    tokens = tokens_of(models.deit(global_pool=pool).eval(), torch.randn(1, 3, 32, 32))
    assert torch.allclose(tokens.readout("mean"), oracle.readout_weights(readout, 1, 17))


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_pooling_without_fixed_shares_is_refused(pool):
    with pytest.raises(VitxError, match=f"pools its tokens by '{pool}'"):
        tokens_of(models.deit(global_pool=pool).eval(), torch.randn(1, 3, 32, 32))


def test_a_wrapped_model_is_found():
    model = nn.Sequential(models.built("dinov2 with registers"))
    assert tokens_of(model, torch.randn(1, 3, 32, 32)).prefix == 5


class Plain(nn.Module):
    """A Vision Transformer that declares nothing."""

    def __init__(self, prefix):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, images):
        patches = self.patches(images).flatten(2).mT
        return self.layer(torch.cat([self.prefix.expand(len(images), -1, -1), patches], 1))[:, 0]


@pytest.mark.parametrize(("prefix", "readout"), [(0, "patches"), (1, "token")])
def test_an_undeclared_model_is_guessed_from_its_token_count(prefix, readout):
    tokens = tokens_of(Plain(prefix).eval(), torch.randn(1, 3, 32, 24))
    assert (tokens.prefix, tokens.grid) == (prefix, (4, 3))
    assert torch.allclose(tokens.readout("mean"), oracle.readout_weights(readout, prefix, prefix + 12))


def test_an_undeclared_model_with_more_tokens_is_refused():
    with pytest.raises(VitxError, match="18 tokens do not fit a grid of 4 x 4 patches"):
        tokens_of(Plain(2).eval(), torch.randn(1, 3, 32, 32))


def test_a_declared_prefix_that_does_not_fit_is_refused():
    model, images = models.deit().eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), capture(model) as trace:
        model(images)
    model.num_prefix_tokens = 3
    with pytest.raises(VitxError, match="17 tokens do not fit a grid of 4 x 4 patches and 3 prefix tokens"):
        find_tokens(model, trace, images)


def test_two_poolings_are_refused():
    model, images = models.built("siglip"), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), capture(model) as trace:
        model(images)
    trace.pooling.append(trace.pooling[0])
    with pytest.raises(VitxError, match="2 attentions with a single query"):
        find_tokens(model, trace, images).readout("mean")
