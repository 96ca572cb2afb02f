"""Models with what a plain Vision Transformer lacks: windows, shifts, merging, pooling, stems, branches."""

import pytest
import timm
import torch

from tests import models

WIDTHS, HEADS = (24, 48, 96, 192), (1, 2, 4, 8)  # of four stages
STAGES = {"embed_dims": WIDTHS, "num_heads": HEADS}


def carried(name, change=lambda model: model, **options):
    """Return a function that makes a timm model with random weights and 7 classes."""

    def make():
        if not timm.is_model(name):
            pytest.skip(f"timm {timm.__version__} has no {name}")
        torch.manual_seed(0)
        return change(timm.create_model(name, num_classes=models.CLASSES, **options))

    return make


def hugging_face(name, full=False):
    """Return a function that makes a model of transformers."""
    small = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
    options = {"num_labels": models.CLASSES} | ({} if full else {"image_size": 64, **small})

    def make():
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return make


def torchvision_swin():
    from torchvision.models import SwinTransformer

    torch.manual_seed(0)
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=models.CLASSES)


SWIN_V2 = {"img_size": 64, "window_size": 4, "embed_dim": 24, "num_heads": HEADS}
BESIDE = {"img_size": 32, "patch_size": 8, "block_fn": timm.models.vision_transformer.ParallelScalingBlock}
EFFICIENT = {"embed_dims": WIDTHS, "depths": (1, 1, 1, 3), "num_vit": 1}
HIERA = {"img_size": 64, "embed_dim": 24, "stages": (1, 2, 3, 2)}
# How to make a model, the size of its images, and the grid of its maps, if known.
KINDS = {
    "Swin": (models.swin, 32, (16, 16)),
    "Swin-V2": (carried("swinv2_tiny_window8_256", models.spread, **SWIN_V2), 64, (16, 16)),
    "Hiera": (carried("hiera_tiny_224", models.spread, **HIERA), 64, (16, 16)),
    "SAM": (lambda: models.timm_model("samvit_base_patch16"), 32, (4, 4)),
    "PiT": (carried("pit_ti_224", img_size=64), 64, None),
    "PVT-v2": (carried("pvt_v2_b0"), 64, (16, 16)),
    "CaiT": (carried("cait_xxs24_224", img_size=32, patch_size=8, depth=3), 32, (4, 4)),
    "Twins": (carried("twins_svt_small", **STAGES, depths=(2, 2, 2, 2)), 64, (16, 16)),
    "LeViT": (carried("levit_128s"), 224, (14, 14)),
    "MobileViT": (carried("mobilevit_xxs"), 64, None),
    "EfficientFormer": (carried("efficientformer_l1", **EFFICIENT), 224, None),
    "ConViT": (carried("convit_tiny", img_size=64, depth=4, local_up_to_layer=3), 64, (4, 4)),
    "attentions side by side": (lambda: models.timm_model("vit_small_patch16_18x2_224"), 32, (4, 4)),
    "attention beside MLP": (carried("vit_tiny_patch16_224", **BESIDE), 32, (4, 4)),
    "DaViT": (carried("davit_tiny", **STAGES, depths=(1, 1, 2, 1)), 64, (16, 16)),
    "EdgeNeXt": (carried("edgenext_xx_small"), 64, (16, 16)),
    "hf Swin": (hugging_face("Swin"), 64, (16, 16)),
    "hf Swin-V2": (hugging_face("Swinv2"), 64, (16, 16)),
    "hf SegFormer": (hugging_face("Segformer", full=True), 64, (16, 16)),
    "hf PVT-v2": (hugging_face("PvtV2", full=True), 64, (16, 16)),
    "torchvision Swin": (torchvision_swin, 64, (16, 16)),
    "differential attention": (lambda: models.timm_model("vit_dlittle_patch16_reg1_gap_256"), 32, (4, 4)),
    "BoTNet": (carried("botnet26t_256", img_size=128), 128, (8, 8)),
    "XCiT": (carried("xcit_nano_12_p16_224", embed_dim=48, depth=3, num_heads=3), 64, (4, 4)),
    "VOLO": (carried("volo_d1_224", img_size=64), 64, (8, 8)),
    "GC-ViT": (carried("gcvit_xxtiny", img_size=64), 64, (16, 16)),
}
