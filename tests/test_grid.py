"""The grid of a map: where the first tokens lie in the picture."""

import pytest
import timm
import torch

from tests import models
from tests.modules import Around
from vitx import attention_rollout, capture, explain, explain_methods


def images(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("methods", [["rollout"], ["grad_rollout", "gae", "evidence", "attention"]], ids=str)
@pytest.mark.parametrize("name", ["botnet26t_256", "halonet26t"])
def test_behind_a_stem_of_residuals_it_is_that_of_what_attends(name, methods):
    model = models.spread(timm.create_model(name, num_classes=5)).eval()
    for method, found in explain_methods(model, images(256), methods, target=1).items():
        assert found.maps.shape == (1, 16, 16), method


@pytest.mark.parametrize(("patch", "size", "cell"), [(4, 30, 2), (16, 30, 2), (16, 40, 8), (16, 48, 16)])
def test_a_picture_that_is_padded_is_not_moved(patch, size, cell):
    """Tokens at the end cover less of it, so the cells of the map are part of a patch, and not brighter."""
    torch.manual_seed(0)
    name, options = "vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}
    model = timm.create_model(name, depth=2, patch_size=patch, num_classes=5, **options).eval()
    with torch.no_grad(), capture(model) as trace:
        model(images(size))
    count = -(-size // patch)
    share = attention_rollout(trace.attentions())[:, 1:].view(1, count, count)
    pixels = torch.arange(size) // patch
    wanted = share[:, pixels][:, :, pixels].unfold(1, cell, cell).unfold(2, cell, cell).sum((3, 4))
    wanted *= share.sum() / wanted.sum()
    torch.testing.assert_close(explain(model, images(size)).maps, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["rollout", "attention"])
def test_attention_that_is_the_same_everywhere_makes_an_even_map_of_patches_that_overlap(method):
    """AST has patches of 16 px every 10 px, and no patch covers the last 8 bins of the spectrogram."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ASTConfig(**sizes, max_length=96, num_mel_bins=64)
    model = transformers.ASTForAudioClassification(config).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.out_features == layer.in_features:
            torch.nn.init.zeros_(layer.weight)  # all queries and keys are equal, and so are their scores
    maps = explain(model, torch.randn(2, 96, 64), method).maps  # in cells of 2 px
    assert maps.shape == (2, 48, 32)
    torch.testing.assert_close(maps[:, :, :28], maps[:, :1, :1].expand(2, 48, 28), rtol=1e-4, atol=0)
    assert not maps[:, :, 28:].any()


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_channels_that_come_last(method):
    """Some loaders put the channels last, and the model moves them to the front."""

    model = models.spread(timm.create_model("test_vit", img_size=48, patch_size=16, num_classes=5)).eval()
    found = explain(
        Around(lambda model, x: model(x.permute(0, 3, 1, 2)), model),
        images(48).permute(0, 2, 3, 1),
        method,
        target=1,
    )
    torch.testing.assert_close(found.maps, explain(model, images(48), method, target=1).maps)
    assert found.channels == 3
    assert found.image_size == (48, 48)
    assert found.pixels().shape == (1, 48, 48, 3)
