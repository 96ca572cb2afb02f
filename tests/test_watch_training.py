"""A watched training is the same bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader
from timm.utils import random_seed
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from tests.lightning_models import IMAGE, samples
from tests.loops import IMAGES, Net, accelerator
from tests.models import checkpointed
from tests.run_folders import shown
from tests.training import assert_same
from vitx import Watch


def compiled(net):
    if torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6 fails to compile this module, with the watch and without")
    del net.vit.blocks[1:]
    return torch.compile(net, backend="aot_eager")  # without inductor, which needs a C++ compiler


def frozen(net):
    net.vit.requires_grad_(False).eval()
    return net


def accelerated(net):
    return accelerator(mixed_precision="bf16").prepare(net)


@dataclass
class Setting:
    """One test case: settings of the loop and of its watch."""

    watch: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[nn.Module], nn.Module] = lambda net: net
    autocast: bool = False
    accumulate: int = 1
    average: bool = False
    loader: dict[str, Any] = field(default_factory=dict)
    data: Any = None


SETTINGS = {
    "dropout and BatchNorm": Setting(),
    "bf16 by autocast": Setting(autocast=True),
    "accumulating 3 batches": Setting(accumulate=3),
    "a compiled model": Setting(prepare=compiled),
    "EMA": Setting(average=True),
    "EMA, explained": Setting(average=True, watch={"weights": "ema"}),
    "a frozen backbone in eval mode": Setting(prepare=frozen),
    "gradient checkpointing": Setting(prepare=lambda net: checkpointed(net.vit) or net),
    "bf16 throughout": Setting(prepare=lambda net: net.to(torch.bfloat16)),
    "prepared by Accelerate, in bf16": Setting(prepare=accelerated),
    "loaders with workers": Setting(loader={"num_workers": 1}),
    "given images": Setting(data=IMAGES),
    "one image of each class": Setting(watch={"per_class": True}),
    "no saved maps": Setting(watch={"save_maps": False}),
}


class Averaging(nn.Module):
    """A model with the running average of its weights."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def forward(self, images):
        return self.net(images)


def train(setting: Setting, folder: Path | None) -> dict[str, torch.Tensor]:
    """Train for two epochs of four batches, watched if there is a folder; return all that results."""
    torch.manual_seed(1)
    np.random.seed(1)
    model = setting.prepare(Net())
    model = Averaging(model) if setting.average else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = DataLoader(samples(16), batch_size=4, shuffle=True, **setting.loader)
    held_out = DataLoader(samples(8, seed=1), batch_size=4, **setting.loader)
    seen = held_out if setting.data is None else setting.data
    options = {"num_images": (2, 8), "on_error": "raise"} | setting.watch
    watch = Watch(model, seen, log_dir=folder, **options) if folder else None
    found, kind = {}, next(model.parameters()).dtype
    for step in range(8):
        if watch and step == 0:
            watch(0)
        if step % 4 == 0:
            batches = iter(data)
        images, labels, _ = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            loss = F.cross_entropy(model(images.to(kind)).float(), labels)
        (loss / setting.accumulate).backward()
        if (step + 1) % setting.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        if setting.average:
            model.average.update_parameters(model.net)
        found[f"loss at step {step}"] = loss.detach()
        if watch:
            assert watch(step + 1), "nothing was found"
    found |= {f"weight {name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer, {index}.{name}": value for name, value in state.items()}
    found |= {f"gradient {name}": p.grad for name, p in model.named_parameters()}
    found |= {f"mode {name}": torch.tensor(part.training) for name, part in model.named_modules()}
    found |= {f"learns {name}": torch.tensor(p.requires_grad) for name, p in model.named_parameters()}
    found |= {"the next random numbers": torch.rand(3), "numpy's": torch.tensor(np.random.rand(3))}
    return found


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_training_is_the_same(setting, tmp_path):
    watched = train(setting, tmp_path)
    assert_same(train(setting, None), watched)
    assert shown(tmp_path) == list(range(9))


class Photos(Dataset):
    """A data set of pictures, whose transform is set by timm's `create_loader`."""

    transform = None

    def __len__(self):
        return 16

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), index % 3


def train_as_timm(folder: Path | None, loader: dict[str, Any]) -> tuple[str, torch.Tensor]:
    """Train as timm's own train.py; return a hash of the weights, and the next random numbers."""
    random_seed(42, 0)
    model, device = Net(), torch.device("cpu")
    options = {"batch_size": 4, "num_workers": 1, "device": device} | loader
    data = create_loader(Photos(), (3, IMAGE, IMAGE), is_training=True, **options)
    held_out = create_loader(Photos(), (3, IMAGE, IMAGE), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = Watch(model, held_out, folder, on_error="raise") if folder else None
    for epoch in range(2):
        assert watch is None or watch(epoch)
        model.train()
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            for images, _ in held_out:
                model(images)
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return sha256(weights).hexdigest(), torch.rand(3)


@pytest.mark.parametrize(
    "loader", [{}, {"persistent_workers": False}, {"use_multi_epochs_loader": True}], ids=str
)
def test_a_training_with_the_loaders_of_timm_is_the_same(loader, tmp_path):
    (plain, drawn), (watched, drawn_then) = (train_as_timm(one, loader) for one in (None, tmp_path))
    assert plain == watched
    assert torch.equal(drawn, drawn_then)
    assert shown(tmp_path) == [0, 1]
