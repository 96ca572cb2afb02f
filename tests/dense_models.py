"""Small Hugging Face segmenters and detectors with random weights."""

import torch
import transformers

SWIN = {
    **{"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]},
    **{"window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
RESNET = {
    **{"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    **{"layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
}
VIT = {
    **{"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16},
    **{"image_size": 32, "patch_size": 8},
}
DETR = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6, "num_labels": 4},
}
CONVOLUTIONS = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}


def _made(kind, task, behind=None, **config):
    """Make a model of transformers for a task, which may have a backbone behind it."""
    given = {} if behind is None else {"backbone_config": behind}
    made = getattr(transformers, f"{kind}Config")(**given, **config)
    return getattr(transformers, f"{kind}For{task}")(made)


def swin():
    return transformers.SwinConfig(**SWIN)


def resnet():
    return transformers.ResNetConfig(**RESNET)


def segformer():
    return _made(
        *("Segformer", "SemanticSegmentation"),
        **{"num_labels": 5, "depths": [1, 1], "hidden_sizes": [8, 16], "decoder_hidden_size": 16},
        **{"num_encoder_blocks": 2, "sr_ratios": [2, 1], "num_attention_heads": [1, 2]},
        **{"mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2]},
    )


def upernet():
    return _made("UperNet", "SemanticSegmentation", swin(), hidden_size=8, auxiliary_channels=8, num_labels=5)


def dpt():
    neck = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
    return _made("DPT", "SemanticSegmentation", **VIT, **neck, num_labels=5)


def beit():
    head = {"out_indices": [1, 2, 3, 4], "num_labels": 5, "auxiliary_channels": 8, "pool_scales": [1, 2]}
    return _made("Beit", "SemanticSegmentation", **VIT, **head)


def maskformer():
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 4}
    decoder = transformers.DetrConfig(**DETR)
    return _made("MaskFormer", "InstanceSegmentation", swin(), decoder_config=decoder, **sizes)


def mask2former():
    return _made(
        *("Mask2Former", "UniversalSegmentation", swin()),
        **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_labels": 4, "num_queries": 6},
        **{"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16},
        **{"encoder_feedforward_dim": 16},
    )


def detr():
    return _made("Detr", "ObjectDetection", resnet(), **CONVOLUTIONS, **DETR)


def conditional_detr():
    return _made("ConditionalDetr", "ObjectDetection", resnet(), **CONVOLUTIONS, **DETR)


def deformable_detr():
    options = CONVOLUTIONS | DETR | {"d_model": 32, "num_feature_levels": 3}
    return _made("DeformableDetr", "ObjectDetection", resnet(), **options)


def rt_detr():
    return _made(
        *("RTDetr", "ObjectDetection", transformers.RTDetrResNetConfig(**RESNET)),
        **{"encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "encoder_layers": 1},
        **{"encoder_ffn_dim": 16, "encoder_attention_heads": 2, "d_model": 16, "num_queries": 6},
        **{"decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 16, "decoder_layers": 2},
        **{"decoder_attention_heads": 2, "num_labels": 4, "num_denoising": 0, "hidden_expansion": 0.5},
    )


def yolos():
    options = VIT | {"image_size": [32, 32], "num_hidden_layers": 2, "num_labels": 4}
    return _made("Yolos", "ObjectDetection", **options, num_detection_tokens=6)


SEGMENTERS = {one.__name__: one for one in (segformer, upernet, dpt, beit, maskformer, mask2former)}
DETECTORS = {one.__name__: one for one in (detr, conditional_detr, deformable_detr, rt_detr, yolos)}
SIZES = {"upernet": 64, "maskformer": 64, "mask2former": 64, "detr": 64, "conditional_detr": 64}
SIZES |= {"deformable_detr": 64, "rt_detr": 64}


def made(name):
    """Build a model, and images that it accepts."""
    torch.manual_seed(0)
    model = (SEGMENTERS | DETECTORS)[name]().eval()
    size = SIZES.get(name, 32)
    return model, torch.rand(2, 3, size, size)


def save(name, folder):
    """Save a model with its image processor, as users do."""
    kinds = {
        "segformer": (transformers.SegformerImageProcessor, {"height": 32, "width": 32}),
        "yolos": (transformers.YolosImageProcessor, {"height": 32, "width": 32}),
        "detr": (transformers.DetrImageProcessor, {"shortest_edge": 64, "longest_edge": 128}),
    }
    model, _ = made(name)
    if name == "yolos":  # its queries start out equal
        torch.nn.init.normal_(model.vit.embeddings.detection_tokens)
    model.save_pretrained(folder)
    processor, size = kinds[name]
    processor(size=size).save_pretrained(folder)
