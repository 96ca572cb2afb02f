"""Tiny vision-language models with random weights, their processors, and inputs of pictures and words."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from tests.texts import SEEN

IMAGE = 10  # the token that stands for a part of the picture
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MERGING = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


GRID = {"image_grid_pinpoints": [[32, 32], [32, 64], [64, 32]]}


def _made(kind: str, seen: Any, text: Any, **options: Any) -> nn.Module:
    """Make a model of transformers from the configs of its parts."""
    named = {"image_token_id": IMAGE, **options}
    config = getattr(transformers, f"{kind}Config")(vision_config=seen, text_config=text, **named)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def llava() -> nn.Module:
    tower, text = transformers.CLIPVisionConfig(**SEEN, projection_dim=32), transformers.LlamaConfig(**TEXT)
    return _made("Llava", tower, text, image_token_index=IMAGE, vision_feature_layer=-2)


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**SEEN, vision_use_head=False)


def llava_onevision() -> nn.Module:
    tokens = {"image_token_index": IMAGE, "video_token_id": 11, "video_token_index": 11}
    options = {**tokens, **GRID, "vision_feature_layer": -1}
    return _made("LlavaOnevision", _siglip(), transformers.Qwen2Config(**TEXT), **options)


def _qwen(kind: str, **tower: Any) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    tokens = {"video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
    seen, text = {**MERGING, "hidden_size": 32, **tower}, {**TEXT, "rope_parameters": rope}
    return _made(kind, seen, text, **tokens)


def qwen2_vl() -> nn.Module:
    return _qwen("Qwen2VL", embed_dim=32, mlp_ratio=2)


def qwen2_5_vl() -> nn.Module:
    more = {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", **more)


def internvl() -> nn.Module:
    seen = {**SEEN, "image_size": [32, 32], "patch_size": [8, 8]}
    options = {"image_seq_length": 4, "downsample_ratio": 0.5}
    return _made("InternVL", seen, transformers.Qwen2Config(**TEXT), **options)


def idefics3() -> nn.Module:
    return _made("Idefics3", SEEN, transformers.LlamaConfig(**TEXT), scale_factor=2, pad_token_id=0)


def paligemma() -> nn.Module:
    options = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    return _made("PaliGemma", _siglip(), transformers.GemmaConfig(**TEXT, head_dim=8), **options)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def prompt(*tokens: int) -> torch.Tensor:
    """Return a prompt around the given tokens; `IMAGE` stands for a part of a picture."""
    return torch.tensor([[1, 5, *tokens, 6, 7, 8]])


def _patches(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return patches for Qwen models, in which the two frames of a picture are the same."""
    count = sum(rows * columns for rows, columns in grids)
    patches = pictures(count, 3, 1, 4, 4).expand(-1, -1, 2, -1, -1).reshape(count, -1)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


def _qwen_inputs(*grids: tuple[int, int]) -> dict[str, torch.Tensor]:
    seen = [token for rows, columns in grids for token in (12, *[IMAGE] * (rows * columns // 4), 13)]
    ids = prompt(*seen)
    return {**_patches(*grids), "input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int()}


def _plain_inputs(parts: int, *before: int) -> list[dict[str, torch.Tensor]]:
    """Return inputs of one picture and of two, which the model cuts into so many parts each."""
    prompts = prompt(*[IMAGE] * parts), prompt(*[IMAGE] * parts, 9, *[IMAGE] * parts)
    return [
        {"pixel_values": pictures(*before, count, 3, 32, 32), "input_ids": ids}
        for count, ids in enumerate(prompts, 1)
    ]


# Each model with its inputs for a question about one picture, and about two.
FAMILIES: dict[str, tuple[Any, ...]] = {
    "LLaVA": (llava, *_plain_inputs(16)),
    "LLaVA-OneVision": (  # sees a picture as a whole and in parts, of which there is one here
        llava_onevision,
        {
            "pixel_values": pictures(1, 2, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 32]]),
            "input_ids": prompt(*[IMAGE] * 36),
        },
        {
            "pixel_values": pictures(2, 2, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 32]] * 2),
            "input_ids": prompt(*[IMAGE] * 17, 9, *[IMAGE] * 17),
            "batch_num_images": torch.tensor([2]),
        },
    ),
    "Qwen2-VL": (qwen2_vl, _qwen_inputs((4, 6)), _qwen_inputs((4, 6), (8, 2))),
    "Qwen2.5-VL": (qwen2_5_vl, _qwen_inputs((4, 6)), _qwen_inputs((4, 6), (8, 2))),
    "InternVL": (internvl, *_plain_inputs(4)),
    "Idefics3": (idefics3, *_plain_inputs(4, 1)),
    "PaliGemma": (paligemma, *_plain_inputs(16)),
}


@cache
def built(name: str) -> nn.Module:
    """Build a model of a family once."""
    torch.manual_seed(0)
    return FAMILIES[name][0]().eval()


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "what", "is", "it", "cat", "dog"]
SQUARE = {"height": 32, "width": 32}


def tokenizer(*special: str) -> Any:
    """Make a tokenizer of a few words and of special tokens, whose ids begin at 10."""
    known = [*WORDS, *special]
    known += [f"word{number}" for number in range(len(known), TEXT["vocab_size"])]
    words = {word: number for number, word in enumerate(known)}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([*special])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def _processor_of_qwen(kind: str) -> Any:
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(
            patch_size=4, min_pixels=64, max_pixels=1024, merge_size=2
        ),
        tokenizer=tokenizer(*special),
        video_processor=transformers.Qwen2VLVideoProcessor(),
    )


def _processor_of_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=SQUARE, **GRID),
        tokenizer=tokenizer("<image>", "<video>"),
        video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def _processor_of_internvl() -> Any:
    made = tokenizer("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
    names = {
        "start_image": "<img>",
        "end_image": "</img>",
        "context_image": "<IMG_CONTEXT>",
        "video": "<video>",
    }
    for name, token in names.items():
        setattr(made, f"{name}_token", token)
        setattr(made, f"{name}_token_id", made.convert_tokens_to_ids(token))
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=SQUARE, max_patches=1),
        tokenizer=made,
        video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=4,
    )


def _processor_of_idefics3() -> Any:
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}
        ),
        tokenizer=tokenizer(*special),
        image_seq_len=4,
    )


def _processor_of_paligemma() -> Any:
    images = transformers.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer("<image>"))


def _processor_of_llava() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE),
        tokenizer=tokenizer("<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "LLaVA": _processor_of_llava,
    "LLaVA-OneVision": _processor_of_onevision,
    "Qwen2-VL": lambda: _processor_of_qwen("Qwen2VL"),
    "Qwen2.5-VL": lambda: _processor_of_qwen("Qwen2_5_VL"),
    "InternVL": _processor_of_internvl,
    "Idefics3": _processor_of_idefics3,
    "PaliGemma": _processor_of_paligemma,
}


@cache
def processor(name: str) -> Any:
    """Make the processor of a family once."""
    return PROCESSORS[name]()


def save(name: str, folder: Path) -> None:
    """Save a model with its processor, as usual."""
    built(name).save_pretrained(folder)
    processor(name).save_pretrained(folder)
