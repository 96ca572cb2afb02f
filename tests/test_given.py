"""Inputs other than the picture: a mapping that is passed to forward, patches and their shapes."""

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from tests import models, vision_language
from vitx import VitxError, explain, trace
from vitx.models.given import read_inputs

IMAGES = models.FAMILIES["deit"].images()


def word(logits):
    return logits[:, -1, 5]


class WithAge(nn.Module):
    """A model that takes an input besides images."""

    def __init__(self):
        super().__init__()
        self.vit = models.built("deit")

    def forward(self, x, age, scale=None):
        return self.vit(x) * age[:, None] + (0 if scale is None else scale.mean())


@pytest.fixture(scope="module")
def naflex():
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Siglip2VisionConfig(**small, patch_size=8, num_patches=16)
    return transformers.Siglip2VisionModel(config).eval()


def patches(*shapes):
    """Return noisy pictures of the given (rows, columns) of patches, padded to 8 patches."""
    pixels = vision_language.pictures(len(shapes), 8, 3 * 8 * 8)
    seen = torch.stack([torch.arange(8) < rows * columns for rows, columns in shapes])
    return {
        "pixel_values": pixels * seen[..., None],
        "pixel_attention_mask": seen.int(),
        "spatial_shapes": torch.tensor(shapes),
    }


@pytest.mark.parametrize("method", ["evidence", "grad_rollout"])
def test_goes_to_forward_whole(method):
    age = torch.tensor([2.0, 3.0])
    given = {"x": IMAGES, "age": age}
    before = {name: one.clone() for name, one in given.items()}

    class Wrapped(WithAge):
        def forward(self, x):
            return super().forward(x, age)

    found = explain(WithAge(), inputs=given, method=method, target=[1, 4])
    wanted = explain(Wrapped(), IMAGES, method, target=[1, 4])
    assert torch.equal(found.maps, wanted.maps)
    assert torch.equal(found.logits, wanted.logits)
    assert all(torch.equal(given[name], one) for name, one in before.items())


def test_the_image_is_named_where_several_may_be():
    given = {"x": IMAGES, "age": torch.ones(2), "scale": torch.rand(2, 1, 4, 4)}
    with pytest.raises(
        VitxError, match=r"several of the inputs may be .* x: Tensor \(2, 3, 32, 32\) of torch.float32, age"
    ):
        explain(WithAge(), inputs=given)
    assert explain(WithAge(), inputs=given, image="x").maps.shape == (2, 4, 4)
    assert trace(WithAge(), inputs=given, image="x").tape.image.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: explain(WithAge(), IMAGES), r"takes more than images, age: give all by inputs=\{\"x\": "),
        (lambda: explain(WithAge(), inputs={"x": IMAGES}), r"refused images .*missing 1 .* 'age'"),
        (lambda: explain(WithAge(), inputs={"age": torch.ones(2)}), r"none of the inputs may be the image"),
        (lambda: explain(WithAge(), inputs={"x": IMAGES}, image="y"), r"image='y' is no floating-point"),
        (lambda: explain(WithAge(), inputs=[IMAGES]), r"inputs must be a mapping .* found list"),
        (lambda: explain(WithAge()), r"give either images, or all arguments of the model"),
        (lambda: explain(WithAge(), IMAGES, inputs={"x": IMAGES}), r"give either images, or all"),
    ],
    ids=["images alone", "one is missing", "no image", "no such image", "no mapping", "nothing", "both"],
)
def test_says_what_is_missing(call, sentence):
    with pytest.raises(VitxError, match=sentence):
        call()


def test_a_model_of_text_and_images_asks_for_both():
    given = vision_language.FAMILIES["LLaVA"][1]
    with pytest.raises(VitxError, match="also takes text, and failed without it: give all by inputs="):
        explain(vision_language.built("LLaVA"), given["pixel_values"])


@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_patches_of_pictures_of_several_sizes(naflex, method):
    """Each picture has the same map as alone, and nothing outside of it."""
    shapes, given = [(2, 3), (4, 2)], patches((2, 3), (4, 2))
    both = explain(naflex, inputs=given, method=method, target=lambda output: output[:, 3])
    assert both.maps.shape == (2, 4, 3)
    assert both.images.shape == (2, 3, 32, 24)
    for index, (rows, columns) in enumerate(shapes):
        alone = {name: one[index : index + 1] for name, one in given.items()}
        wanted = explain(naflex, inputs=alone, method=method, target=lambda output: output[:, 3]).maps[0]
        assert wanted.shape == (rows, columns)
        assert torch.allclose(both.maps[index, :rows, :columns], wanted, atol=1e-6)
        assert both.maps[index].sum().item() == pytest.approx(wanted.sum().item(), rel=1e-4)


def test_says_what_patches_need(naflex):
    given = patches((2, 3), (4, 2))
    with pytest.raises(VitxError, match=r'give all by inputs=\{"pixel_values": ..., "pixel_attention_mask"'):
        explain(naflex, given["pixel_values"])
    given["spatial_shapes"] = torch.tensor([[3, 3], [4, 2]])
    with pytest.raises(
        VitxError, match=r"with spatial_shapes \[\(3, 3\), \(4, 2\)\] cannot be joined to pictures"
    ):
        explain(naflex, inputs=given)


@pytest.mark.parametrize("kind", ["Siglip2", "Qwen2VL"])
def test_patches_lie_as_their_processor_cut_them(naflex, kind):
    """Pictures reassembled from patches equal those that went into the processor, up to its normalization."""
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in [(24, 16), (16, 32)]]
    sizes = {"Siglip2": {"patch_size": 8, "max_num_patches": 8, "do_resize": False}}
    sizes["Qwen2VL"] = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
    processor = getattr(transformers, f"{kind}ImageProcessor")(**sizes[kind])
    model = naflex if kind == "Siglip2" else vision_language.built("Qwen2-VL")
    found, inputs = read_inputs(model, dict(processor(pictures, return_tensors="pt")))
    assert found.shape == (2, 3, 32, 24)
    plain = transformers.ViTImageProcessor(
        do_resize=False, image_mean=processor.image_mean, image_std=processor.image_std
    )
    for picture, one in zip(pictures, found, strict=True):
        wanted = plain(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(one[:, : wanted.shape[1], : wanted.shape[2]], wanted, atol=1e-5)
    assert inputs.together


@pytest.mark.parametrize("name", vision_language.FAMILIES)
def test_vision_language_models(name):
    """Pictures, text and constants sum to the logit, and each picture in the prompt has a map."""
    _, one, two = vision_language.FAMILIES[name]
    model = vision_language.built(name)
    parts = 2 if name == "LLaVA-OneVision" else 1
    for pictures, given in enumerate((one, two), 1):
        found = explain(model, inputs=given, method="evidence", target=word)
        assert len(found.maps) == len(found.images) == len(found.logits) == pictures * parts
        assert (found.conservation - 1).abs().max() < 1e-3
        assert (found.maps.flatten(1).amax(1) > 0).any()
    assert found.picture().ndim == 3


@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL", "Idefics3"])
@pytest.mark.parametrize("method", ["rollout", "grad_rollout", "evidence"])
def test_a_picture_that_comes_later_in_the_prompt_counts_nothing(name, method):
    _, _, given = vision_language.FAMILIES[name]
    where = given["input_ids"][0].tolist().index(9) if name != "Qwen2-VL" else 9
    found = explain(
        vision_language.built(name), inputs=given, method=method, target=lambda logits: logits[:, where, 5]
    )
    assert found.maps[0].max() > 0
    assert found.maps[1].abs().max() < 1e-6


def test_what_a_tower_projects_is_explained():
    """The projection of CLIP's vision tower is explained, not the tokens before it."""
    config = transformers.CLIPVisionConfig(**vision_language.SEEN, projection_dim=6)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    assert explain(model, IMAGES).logits.shape == (2, 6)
    assert explain(model, IMAGES, "evidence", target=lambda features: features[:, 3]).maps.shape == (2, 4, 4)
