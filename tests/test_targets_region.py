"""A part of a dense output as the target."""

import pytest
import torch
import transformers

from tests.by_hand import check
from vitx.targets import region

SEGFORMER = {
    **{"num_labels": 5, "depths": [1, 1], "hidden_sizes": [8, 16], "decoder_hidden_size": 16},
    **{"num_encoder_blocks": 2, "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
    **{"patch_sizes": [7, 3], "strides": [4, 2]},
}


@pytest.fixture(scope="module")
def segformer():
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SEGFORMER)).eval()


EVERY_OTHER = torch.arange(32) // 4 % 2 * torch.ones(32, 1)
PARTS = {
    "box": ({"box": (8, 16, 24, 32)}, lambda out: out.logits[:, 3, 4:8, 2:6].sum((1, 2))),
    "half a cell": (
        {"box": (8, 16, 18, 32)},
        lambda out: (out.logits[:, 3, 4:8, 2:5] * torch.tensor([1, 1, 0.5])).sum((1, 2)),
    ),
    "point": ({"point": (13, 31)}, lambda out: out.logits[:, 3, 7, 3]),
    "mask": ({"mask": EVERY_OTHER}, lambda out: out.logits[:, 3, :, 1::2].sum((1, 2))),
}


@pytest.mark.parametrize(("part", "score"), PARTS.values(), ids=PARTS)
def test_it_is_the_score_by_hand(segformer, part, score):
    found = check(segformer, torch.rand(2, 3, 32, 32), region(3, **part), score, ("rollout", "evidence"))
    assert found["rollout"].logits.shape == (2, 5, 8, 8)
    assert found["rollout"].captions[0].startswith("class 3: ")
