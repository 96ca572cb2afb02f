"""Small models with random weights, one for each family that vitx explains."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import timm
import torch
from torch import nn

CLASSES = 7
SIZE = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": CLASSES}
HF_SIZE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}


@dataclass(frozen=True)
class Family:
    """A model, and facts about its tokens that were taken from its library's code.

    Attributes:
        build: builds the model, in training mode as libraries do.
        prefix: number of tokens that are not patches.
        readout: "token", "distilled", "patches", "all", "token+patches" or "attention".
        grid: rows and columns of patches.
        image_size: height and width in pixels.
        classes: whether the output has classes; otherwise a target must be a function.
        exact: whether float64 stays float64 inside (Hugging Face's "eager" computes the softmax in float32).
    """

    build: Callable[[], nn.Module]
    prefix: int
    readout: str
    grid: tuple[int, int] = (4, 4)
    image_size: tuple[int, int] = (32, 32)
    classes: bool = True
    exact: bool = True

    @property
    def target(self):
        """The predicted class, or a function if there are no classes."""
        return None if self.classes else lambda output: output[:, 2]

    def images(self, batch=2, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, *self.image_size, generator=generator, dtype=torch.float64).to(dtype)


def spread(model):
    """Draw weights that are large enough for attention to be far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                scales = any(word in name for word in ("weight", "gamma", "lambda"))
                parameter.copy_(0.1 * noise + scales)
            elif parameter.ndim == 2 and "bias_table" not in name:
                fan_in = parameter.shape[0] if name == "proj" else parameter.shape[1]
                parameter.copy_(1.3 * noise / fan_in**0.5)
            elif parameter.ndim == 4 and "pos" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)
    return model


def timm_model(name, **overrides):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    options = {**SIZE, "img_size": 32, "patch_size": 8, **overrides}
    try:
        return spread(timm.create_model(name, **options))
    except TypeError as error:  # for an option that was added later
        pytest.skip(f"timm {timm.__version__}: {error}")


def deit(**overrides):
    """Return the model that most tests use."""
    return timm_model("deit_tiny_patch16_224", **overrides)


def checkpointed(model):
    """Turn on gradient checkpointing, in the variant (reentrant or not) that timm uses."""
    model.set_grad_checkpointing(True)
    return model


def without_fused_attention():
    model = deit()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def hugging_face(name, attention):
    import transformers

    configs = {"ViT": transformers.ViTConfig, "DeiT": transformers.DeiTConfig}
    config = configs.get(name[:4].rstrip("F"), transformers.Dinov2Config)
    return spread(getattr(transformers, name)(config(**HF_SIZE, attn_implementation=attention)))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return spread(
        VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=3,
            num_heads=3,
            hidden_dim=48,
            mlp_dim=96,
            num_classes=CLASSES,
        )
    )


def open_clip_tower(**overrides):
    from open_clip.transformer import VisionTransformer

    options = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 3}
    return spread(VisionTransformer(**options, mlp_ratio=2.0, output_dim=CLASSES, **overrides))


def _timm(name, prefix, readout, **overrides):
    return Family(lambda: timm_model(name, **overrides), prefix, readout)


def _hugging_face(name, attention, prefix, readout):
    return Family(lambda: hugging_face(name, attention), prefix, readout, exact=attention == "sdpa")


FAMILIES = {
    "deit": Family(deit, 1, "token"),
    "deit without fused attention": Family(without_fused_attention, 1, "token"),
    "distilled deit": _timm("deit_tiny_distilled_patch16_224", 2, "distilled"),
    "deit3": _timm("deit3_small_patch16_224", 1, "token"),
    "dinov2 with registers": _timm("vit_small_patch14_reg4_dinov2", 5, "token"),
    "dinov3": _timm("vit_small_patch16_dinov3", 5, "patches"),
    "siglip": _timm("vit_base_patch16_siglip_224", 0, "attention"),
    "perception encoder": _timm("vit_pe_core_tiny_patch16_384", 1, "attention"),
    "average pooling": _timm("vit_base_patch16_rpn_224", 0, "patches"),
    "average of all tokens": _timm(
        "vit_base_patch16_224", 1, "all", global_pool="avg", pool_include_prefix=True
    ),
    "eva02": _timm("eva02_tiny_patch14_224", 1, "patches"),
    "beit": _timm("beit_base_patch16_224", 1, "patches"),
    "relative position": _timm("vit_relpos_small_patch16_224", 0, "patches"),
    "relative position, class token": _timm("vit_relpos_base_patch16_clsgap_224", 1, "patches"),
    "clip": _timm("vit_base_patch32_clip_224", 1, "token"),
    "rope": _timm("vit_small_patch16_rope_224", 1, "token"),
    "mixed rope": _timm("vit_small_patch16_rope_mixed_224", 1, "token"),
    "flexivit": _timm("flexivit_small", 1, "token"),
    "naflex": _timm("naflexvit_base_patch16_gap", 4, "patches"),
    "hybrid": Family(
        lambda: timm_model("vit_tiny_r_s16_p8_224", img_size=64, patch_size=4),
        1,
        "token",
        image_size=(64, 64),
    ),
    "not square": Family(lambda: deit(img_size=(24, 40)), 1, "token", (3, 5), (24, 40)),
    "dynamic size": Family(lambda: deit(dynamic_img_size=True), 1, "token", (5, 3), (40, 24)),
    "hf vit, sdpa": _hugging_face("ViTForImageClassification", "sdpa", 1, "token"),
    "hf vit, eager": _hugging_face("ViTForImageClassification", "eager", 1, "token"),
    "hf deit, sdpa": _hugging_face("DeiTForImageClassification", "sdpa", 2, "token"),
    "hf deit, eager": _hugging_face("DeiTForImageClassification", "eager", 2, "token"),
    "hf distilled deit, sdpa": _hugging_face("DeiTForImageClassificationWithTeacher", "sdpa", 2, "distilled"),
    "hf distilled deit, eager": _hugging_face(
        "DeiTForImageClassificationWithTeacher", "eager", 2, "distilled"
    ),
    "hf dinov2, sdpa": _hugging_face("Dinov2ForImageClassification", "sdpa", 1, "token+patches"),
    "hf dinov2, eager": _hugging_face("Dinov2ForImageClassification", "eager", 1, "token+patches"),
    "torchvision": Family(torchvision_vit, 1, "token"),
    "open_clip": Family(open_clip_tower, 1, "token", classes=False),
    "open_clip, average pooling": Family(
        lambda: open_clip_tower(pool_type="avg"), 1, "patches", classes=False
    ),
}


@dataclass(frozen=True)
class Refused:
    """A model that cannot be explained, and part of the error message that says why."""

    build: Callable[[], nn.Module]
    image_size: int
    sentence: str


def _unusual(name, **options):
    """Build a timm model that does not accept the sizes of a plain Vision Transformer."""
    return timm.create_model(name, num_classes=CLASSES, **options)


def swin():
    size = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
    return _unusual("swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=2, **size)


class Nested(nn.Module):
    """A model that attends within a nested tensor, whose images may differ in their number of tokens."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        nested = torch.nested.as_nested_tensor([*tokens], layout=self.layout)
        padded = nested.to_padded_tensor(0.0)
        return self.head((tokens + self.attention(padded, padded, padded)[0]).mean(1))


REFUSED = {
    "ResNet": Refused(lambda: _unusual("resnet10t"), 32, "no attention between tokens was found"),
    "EfficientViT": Refused(lambda: _unusual("efficientvit_b0"), 64, "linear attention"),
    "nested tensors": Refused(lambda: Nested(torch.strided).eval(), 32, "with nested tensors"),
    "jagged nested tensors": Refused(lambda: Nested(torch.jagged).eval(), 32, "with nested tensors"),
}

# Models that are not plain Vision Transformers. Attention flow refuses them: it needs a chain of layers on
# the same tokens.
NOT_PLAIN = {
    name: Refused(build, size, "attention flow takes layers that follow one another")
    for name, build, size in (
        ("Swin", swin, 32),
        ("SAM", lambda: timm_model("samvit_base_patch16"), 32),
        ("Hiera", lambda: _unusual("hiera_tiny_224", img_size=64), 64),
        ("PiT", lambda: _unusual("pit_ti_224", img_size=64), 64),
        ("parallel blocks", lambda: timm_model("vit_small_patch16_18x2_224"), 32),
        ("CaiT", lambda: timm_model("cait_xxs24_224"), 32),
        ("XCiT", lambda: _unusual("xcit_nano_12_p16_224", embed_dim=48, depth=2, num_heads=3), 32),
        ("VOLO", lambda: _unusual("volo_d1_224", img_size=64), 64),
        ("GC-ViT", lambda: _unusual("gcvit_xxtiny"), 224),
        ("differential attention", lambda: timm_model("vit_dlittle_patch16_reg1_gap_256"), 32),
    )
}


@cache
def built(name, dtype=torch.float32):
    """Return the family's model in eval mode, built once; tests that change a model build their own."""
    with torch.inference_mode(False):
        return FAMILIES[name].build().to(dtype).eval()
