"""Clips, volumes and spectrograms, explained in the dimensions of the model's input."""

import pytest
import torch
from torch import nn

from tests import models
from vitx import VitxError, attention_rollout, explain

SMALL = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_labels": models.CLASSES,
}
CLIP = {"image_size": 16, "num_frames": 4, **SMALL}
FRAMES = (2, 4, 3, 16, 16)


def hugging_face(name, kind, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    return getattr(transformers, f"{name}For{kind}Classification")(config)


def monai(patches):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    size = {
        "img_size": (8, 8, 16),
        "patch_size": (4, 4, 4),
        "hidden_size": 48,
        "mlp_dim": 64,
        "num_layers": 3,
    }
    return nets.ViT(
        1, **size, num_heads=3, classification=True, num_classes=models.CLASSES, proj_type=patches
    )


def timesformer(attention):
    return hugging_face("Timesformer", "Video", **CLIP, patch_size=8, attention_type=attention)


KINDS = {
    "joint": (lambda: timesformer("joint_space_time"), FRAMES, (4, 2, 2)),
    "divided": (lambda: timesformer("divided_space_time"), FRAMES, (4, 2, 2)),
    "VideoMAE": (lambda: hugging_face("VideoMAE", "Video", **CLIP, patch_size=8), FRAMES, (2, 2, 2)),
    "ViViT": (lambda: hugging_face("Vivit", "Video", **CLIP, tubelet_size=[2, 8, 8]), FRAMES, (2, 2, 2)),
    "AST": (
        lambda: hugging_face(
            "AST",
            "Audio",
            **(SMALL | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8}),
            frequency_stride=8,
            time_stride=8,
        ),
        (2, 32, 16),
        (4, 2),
    ),
    "MONAI conv": (lambda: monai("conv"), (2, 1, 8, 8, 16), (2, 2, 4)),
    "MONAI perceptron": (lambda: monai("perceptron"), (2, 1, 8, 8, 16), (2, 2, 4)),
}

LAID_OUT = {  # the order of the tokens, if it differs from that of the pixels
    "joint": lambda row, grid: row.view(2, *grid[1:], grid[0]).permute(0, 3, 1, 2),
    "divided": lambda row, grid: row.view(2, *grid[1:], grid[0]).permute(0, 3, 1, 2),
    "AST": lambda row, grid: row.view(2, *grid[::-1]).transpose(1, 2),
}


def built(kind):
    build, shape, grid = KINDS[kind]
    torch.manual_seed(0)
    return build().double().eval(), torch.randn(shape, dtype=torch.float64), grid


def matrices(model, images):
    """Return the A of each attention in the order of execution: what a dropout gets after a softmax."""
    found = []

    def keep(module, args, out):
        if args[0].ndim == 4 and args[0].shape[1] == SMALL["num_attention_heads"]:
            rows = args[0].sum(-1)
            if torch.allclose(rows, torch.ones_like(rows)):
                found.append(args[0].detach())

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Dropout)]
    try:
        with torch.no_grad():
            out = model(images) if "MONAI" in type(model).__module__ or images.shape[1] == 1 else None
            out = model(images, output_attentions=True) if out is None else out
    finally:
        for handle in handles:
            handle.remove()
    kept = getattr(out, "attentions", None)
    return found or list(kept)


def divided(attentions, frames, patches):
    """Return divided attention over all tokens, in turn over time and within frames, (B, N, N) each."""
    steps = []
    for number, heads in enumerate(attentions):
        a = heads.mean(1)
        batch = len(a) // (frames if number % 2 else patches)
        whole = torch.eye(1 + frames * patches, dtype=a.dtype).repeat(batch, 1, 1)
        place = 1 + torch.arange(patches * frames).view(patches, frames)
        for image in range(batch):
            whole[image, 1:, 1:] = 0
            if number % 2 == 0:
                for patch in range(patches):
                    at = place[patch]
                    whole[image, at[:, None], at] = a[image * patches + patch]
                continue
            whole[image, 0] = 0
            for frame in range(frames):
                of = a[image * frames + frame]
                at = torch.cat((torch.zeros(1, dtype=torch.long), place[:, frame]))
                whole[image, at[1:, None], at] = of[1:]
                whole[image, 0, at] += of[0] / frames
        steps.append(whole)
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_rollout_is_the_product_of_full_matrices(kind):
    model, images, grid = built(kind)
    found = explain(model, images, "rollout")
    attentions, patches = matrices(model, images), torch.Size(grid).numel()
    if kind == "divided":
        row = torch.eye(1 + patches, dtype=torch.float64)[:1].repeat(2, 1, 1)
        eye = torch.eye(1 + patches, dtype=torch.float64)
        for number, step in reversed(list(enumerate(divided(attentions, grid[0], patches // grid[0])))):
            kept = torch.full((1 + patches,), 0.5, dtype=torch.float64)
            if number % 2 == 0:
                kept[0] = 1  # the class token does not attend over time
            row = row @ (kept[:, None] * eye + (1 - kept)[:, None] * step)
        expected = row[:, 0, 1:]
    else:
        own = attentions[0].shape[-1] - patches
        readout = torch.zeros(own + patches, dtype=torch.float64)
        readout[: own or None] = 1 / (own or patches)
        expected = attention_rollout(attentions, readout=readout)[:, own:]
    expected = LAID_OUT.get(kind, lambda row, grid: row.view(2, *grid))(expected, grid)
    torch.testing.assert_close(found.maps, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["grad_rollout", "gae", "evidence", "attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_explains_them(kind, method):
    model, images, grid = built(kind)
    found = explain(model, images, method)
    assert tuple(found.maps.shape) == (2, *grid)
    assert (found.conservation - 1).abs().max() < 1e-6
    assert (found.maps.flatten(1).std(1) > 0).all()


def test_the_dimension_of_the_channels_is_found():
    frames_first, _, _ = built("VideoMAE")
    assert explain(frames_first, torch.randn(FRAMES).double()).channels == 2
    assert explain(*built("MONAI conv")[:2]).channels == 1
    assert explain(*built("AST")[:2]).channels is None


def test_what_puts_out_more_rows_than_images_is_refused():
    torch.manual_seed(0)
    model = timesformer("space_only").double().eval()  # which outputs a row for each frame
    with pytest.raises(VitxError, match=r"returned \(8, .*for 2 images"):
        explain(model, torch.randn(FRAMES).double())
