"""A small model of Hugging Face, saved as people have it."""

import transformers


def hugging_face(folder, kind="vit", processor=True, **config):
    """Saves a small model, with or without its image processor."""
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, **config)
    classes = {"vit": transformers.ViTForImageClassification, "bare": transformers.ViTModel}
    classes[kind](config).save_pretrained(folder)
    if processor:
        channels = config.num_channels
        scale = {"image_mean": [0.4, 0.5, 0.6][:channels], "image_std": [0.2, 0.3, 0.4][:channels]}
        size = {"height": 32, "width": 32}
        transformers.ViTImageProcessor(size=size, **scale).save_pretrained(folder)
