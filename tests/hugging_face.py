"""Small Hugging Face models, saved as users save them."""

import transformers


def hugging_face(folder, kind="vit", processor=True, **config):
    """Save a small model, with or without its image processor."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, **config)
    classes = {"vit": transformers.ViTForImageClassification, "bare": transformers.ViTModel}
    classes[kind](config).save_pretrained(folder)
    if processor:
        channels = config.num_channels
        scale = {"image_mean": [0.4, 0.5, 0.6][:channels], "image_std": [0.2, 0.3, 0.4][:channels]}
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessor(size=size, **scale).save_pretrained(folder)


def hugging_face_of_clips(folder):
    """Save a small video model with its processor."""
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.VideoMAEConfig(image_size=32, num_frames=4, **small)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(folder)
    crop = {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 32}}
    transformers.VideoMAEImageProcessor(**crop).save_pretrained(folder)
