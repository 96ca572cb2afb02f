"""DeiT-Tiny's real weights on ImageNet validation images."""

import copy
import csv
from collections import defaultdict

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import functional as transforms

from tests import oracle
from vitx import explain, explain_methods
from vitx.metrics import box_masks, energy_inside, pointing_game

pytestmark = pytest.mark.slow

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 30
NAMES = "rollout", "grad_rollout", "evidence"


@pytest.fixture(scope="module")
def model(assets):
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(assets / "deit_tiny_patch16_224.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def samples(assets):
    """Return images (B, 3, 224, 224), their classes, and their boxes as shares of width and height."""
    rows = defaultdict(list)
    with (assets / "imagenet-val" / "boxes.csv").open() as file:
        for row in csv.DictReader(file):
            rows[row["image"]].append(row)
    images, labels, boxes = [], [], []
    for name in sorted(rows)[:COUNT]:
        picture = Image.open(assets / "imagenet-val" / name).convert("RGB")
        squashed = picture.resize((224, 224), Image.Resampling.BICUBIC)
        images.append(transforms.normalize(transforms.to_tensor(squashed), *IMAGENET))
        labels.append(int(rows[name][0]["class_index"]))
        size = torch.tensor([*picture.size, *picture.size])
        boxes.append(
            [torch.tensor([int(row[k]) for k in ("x1", "y1", "x2", "y2")]) / size for row in rows[name]]
        )
    return torch.stack(images), labels, boxes


@pytest.fixture(scope="module")
def explained(model, samples):
    images, labels, _ = samples
    return explain_methods(model, images, NAMES, target=labels)


@pytest.fixture(scope="module")
def masks(samples):
    """Return a mask of each image's objects, (B, 224, 224)."""
    return torch.cat([box_masks(torch.stack(boxes)[None] * 224, (224, 224)) for boxes in samples[2]])


def test_the_weights_see(explained, samples):
    predicted = explained["rollout"].logits[:20].argmax(1).tolist()
    assert sum(p == label for p, label in zip(predicted, samples[1], strict=False)) >= 12


@pytest.fixture(scope="module")
def observed(model, samples):
    """Return what the oracle observes in float64 on four images."""
    return oracle.observe(copy.deepcopy(model).double(), samples[0][:4].double())


# Some of the 38,809 entries lie so close to the threshold that float32 puts them on its other side.
@pytest.mark.parametrize(("fusion", "discard", "single"), [("mean", 0.0, 1e-5), ("max", 0.9, 1e-4)])
def test_equals_the_oracle(model, samples, observed, fusion, discard, single):
    methods = ("rollout", "grad_rollout")
    wanted = {name: oracle.maps_of(observed, name, 1, "token", fusion, discard) for name in methods}
    asked = {name: {"head_fusion": fusion, "discard_ratio": discard} for name in methods}
    for dtype, tolerance in ((torch.float32, single), (torch.float64, 1e-9)):
        same, images = copy.deepcopy(model).to(dtype), samples[0][:4].to(dtype)
        for name, found in explain_methods(same, images, asked).items():
            error = (found.maps.double().flatten(1) - wanted[name]).abs().amax(1)
            assert (error / wanted[name].amax(1)).max() < tolerance


def test_gradient_rollout_points_at_the_object(explained, masks):
    scores = {name: pointing_game(found.heatmaps(), masks).mean() for name, found in explained.items()}
    assert scores["grad_rollout"] >= 0.8
    assert scores["grad_rollout"] > scores["rollout"]


def test_evidence_lies_on_the_object(explained, masks):
    shares = {name: energy_inside(found.maps, masks).mean() for name, found in explained.items()}
    assert shares["evidence"] > shares["rollout"] + 0.2
    assert shares["grad_rollout"] > shares["rollout"] + 0.2


def test_the_linearized_network_finds_more_of_the_object_than_the_plain_one(model, explained, samples, masks):
    plain = explain(model, samples[0], "grad_rollout", gradient="plain").maps
    found = explained["grad_rollout"].maps
    assert energy_inside(found, masks).mean() > energy_inside(plain, masks).mean() + 0.05
