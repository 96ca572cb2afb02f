"""The similarity to another picture as the target."""

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers

from tests.by_hand import METHODS, check
from tests.modules import Around
from vitx import VitxError, explain
from vitx.targets import similar_to

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIZE = {"image_size": 32, "patch_size": 8}


def timms():
    model = timm.create_model("test_vit", num_classes=5, img_size=32, num_heads=2)
    return model, lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


def of_clip():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 9}, vision_config=SMALL | SIZE, projection_dim=16
    )
    model = transformers.CLIPModel(config)
    return model, lambda images: model.visual_projection(model.vision_model(images).pooler_output)


def of_vision_tower():
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**SMALL, **SIZE, projection_dim=16)
    )
    return model, lambda images: model(images).image_embeds


def dinov2():
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, **SIZE))
    return model, lambda images: model.dinov2(images).pooler_output


def vit():
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **SIZE))
    return model, lambda images: model.vit(images).last_hidden_state[:, 0]


def of_open_clip():
    model = open_clip.model.CLIP(
        16,
        open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        open_clip.CLIPTextCfg(context_length=4, vocab_size=9, width=16, heads=2, layers=1),
    )
    return model, lambda images: model.encode_image(images)


@pytest.mark.parametrize("build", [timms, of_clip, of_vision_tower, dinov2, vit, of_open_clip])
def test_it_is_the_cosine_by_hand(build):
    torch.manual_seed(0)
    model, features = build()
    model.eval()
    images, others = torch.rand(2, 3, 32, 32), torch.rand(1, 3, 32, 32)
    pairs = torch.stack([images, others.expand(2, -1, -1, -1)], 1).flatten(0, 1)
    with torch.no_grad():
        held = features(pairs).unflatten(0, (2, 2)).flip(1).flatten(0, 1)

    def tower(model, images):
        found = features(images)
        unit = held / held.norm(dim=1, keepdim=True)
        return (found / found.norm(dim=1, keepdim=True) * unit).sum(1, keepdim=True)

    for method in ("rollout", "evidence"):
        found = explain(model, images, method, target=similar_to(others[0]))
        wanted = explain(Around(tower, model).eval(), pairs, method, target=1)
        assert torch.allclose(found.maps, wanted.maps, rtol=0, atol=1e-6 * float(wanted.maps.max()))
    assert len(found) == 4
    assert found.captions == [f"similarity {value:.3f}" for value in wanted.logits[:, 0].tolist()]


def test_two_pictures_are_drawn_side_by_side():
    model, _ = timms()
    images = torch.rand(1, 3, 32, 32)
    found = explain(model.eval(), images, target=similar_to(torch.rand(3, 32, 32)))
    alone = explain(model, images)
    assert len(found) == 2
    assert found.picture().shape[0] == alone.picture().shape[0]
    assert found.picture().shape[1] > 1.9 * alone.picture().shape[1]


def test_a_training_shows_its_own_images_alone():
    model = timms()[0].eval()
    images, other = torch.rand(2, 3, 32, 32), torch.rand(3, 32, 32)
    pairs = explain(model, images, target=similar_to(other))
    alone = explain(model, images, target=similar_to(other).one_each())
    assert torch.allclose(alone.maps, pairs.maps[::2], atol=1e-6)
    assert alone.captions == pairs.captions[::2]


def test_features_and_files():
    model, features = timms()
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    goal = features(torch.rand(1, 3, 32, 32)).detach()
    unit = goal / goal.norm()

    def score(found):
        return (found / found.norm(dim=1, keepdim=True) * unit).sum(1)

    check(Around(lambda _, x: features(x), model).eval(), images, similar_to(goal[0]), score, METHODS)
    picture = (np.random.default_rng(0).random((50, 40, 3)) * 255).astype(np.uint8)
    assert len(explain(model, picture, target=similar_to(picture))) == 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (torch.rand(3, 16, 16), "prepare both alike"),
        (torch.rand(7), "features of the images have size 64, and the others 7"),
        (torch.rand(3, 64), "3 others for 2 images"),
        (3, "found int"),
    ],
)
def test_bad_words(other, said):
    with pytest.raises(VitxError, match=said):
        explain(timms()[0].eval(), torch.rand(2, 3, 32, 32), target=similar_to(other))
