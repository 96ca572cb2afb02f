"""Tiny models of images and texts with random weights, and tokenizers of a few words."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "dog", "wolf", "the", "picture", "of"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEEN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def tokenizer(words: list[str] = WORDS) -> Any:
    """Make a tokenizer of transformers."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def open_clip_model() -> nn.Module:
    """Make a model of open_clip."""
    from open_clip.model import CLIP

    seen = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
    told = {"context_length": 16, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    return CLIP(24, seen, told)


@cache
def built(kind: str) -> nn.Module:
    """Build a model of transformers, such as CLIP, or of open_clip."""
    torch.manual_seed(0)
    if kind == "open_clip":
        return open_clip_model().eval()
    config: Any = getattr(transformers, f"{kind}Config")
    size = {"projection_dim": 24} if kind not in ("Siglip", "Siglip2") else {}
    seen = {**SEEN, "num_patches": 16} if kind == "Siglip2" else SEEN
    if kind == "Siglip2":
        seen.pop("image_size")
    return getattr(transformers, f"{kind}Model")(config(text_config=TEXT, vision_config=seen, **size)).eval()


def save_clip(folder: Path) -> None:
    """Save a CLIP model with its tokenizer and its image processor, as usual."""
    built("CLIP").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size=size[0], crop_size=size[1]).save_pretrained(folder)
