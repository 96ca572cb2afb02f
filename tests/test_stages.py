"""The stages of a model, and the parameters that belong to each."""

import re

import pytest
import torch
from torch import nn

from tests import models
from vitx import VitxError
from vitx.evaluation.stages import find_stages

IMAGES = models.FAMILIES["deit"].images()
STAGES = ("head", "block 3", "block 2", "block 1", "patch embedding")


def named(model):
    return dict(model.named_parameters())


def by_name(name):
    """Return the stage of a parameter, judged by its name in its library."""
    block = re.search(r"(?:blocks|layers?)\.(?:encoder_layer_)?(\d+)\.", name)
    if block:
        return f"block {int(block[1]) + 1}"
    last = r"((vit|deit|dinov2|encoder)\.)?(norm|fc_norm|head|heads|head_dist|attn_pool|layernorm|ln|ln_post|"
    last += r"proj|classifier|cls_classifier|distillation_classifier)(\.|$)"
    return "head" if re.match(last, name) else "patch embedding"


class Wrapped(nn.Module):
    """A model between other layers, with a shift of the wrapper's own that is added last."""

    def __init__(self, model):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(5))
        self.last = nn.Linear(models.CLASSES, 5)
        self.norm = nn.BatchNorm2d(3)
        self.vit = model

    def forward(self, images):
        return self.last(self.vit(self.norm(images))) + self.shift


class TestStages:
    @pytest.mark.parametrize("family", models.FAMILIES)
    def test_every_parameter_is_where_its_name_says(self, family):
        model = models.built(family)
        stages = find_stages(model, models.FAMILIES[family].images())
        assert tuple(stages) == STAGES[::-1]
        stage_of = {id(tensor): stage for stage, tensors in stages.items() for tensor in tensors}
        assert sum(map(len, stages.values())) == len(stage_of) == len(named(model))
        for name, parameter in model.named_parameters():
            assert stage_of[id(parameter)] == by_name(name), name
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_a_model_in_another(self):
        model = Wrapped(models.deit())
        first, *blocks, last = find_stages(model, IMAGES).values()
        assert len(blocks) == 3
        assert {id(t) for t in last} >= {id(model.shift), *map(id, model.last.parameters())}
        norm = model.norm
        assert {id(t) for t in first} >= set(
            map(id, (norm.weight, norm.bias, norm.running_mean, norm.running_var))
        )

    def test_a_block_that_runs_again_and_again(self):
        model = models.deit()
        model.blocks = nn.Sequential(*[model.blocks[0]] * 3)
        assert list(find_stages(model, IMAGES)) == ["patch embedding", "block 1", "head"]

    def test_asking_for_a_shape_is_no_use(self):
        model = models.deit()
        model.patch_embed.register_forward_pre_hook(
            lambda *_: print(model.head.weight.dtype, len(model.norm.bias))
        )
        assert len(find_stages(model, IMAGES)["head"]) == 4

    def test_without_blocks(self):
        class Flat(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 3, 8, 8))

            def forward(self, images):
                tokens = nn.functional.conv2d(images, self.weight, stride=8).flatten(2).mT[:, None]
                for _ in range(2):
                    tokens = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
                return tokens[:, 0].mean(1)

        with pytest.raises(VitxError, match="each attention must run in a module of its own"):
            find_stages(Flat(), IMAGES)
