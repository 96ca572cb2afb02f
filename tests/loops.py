"""What the tests of custom training loops share: a plain model, images, a loader and an Accelerator."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.lightning_models import IMAGE, SmallClassifier, samples
from vitx import Watch

IMAGES = torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """A ViT with dropout, drop path and attention dropout, followed by BatchNorm."""

    def __init__(self):
        super().__init__()
        whole = SmallClassifier()
        self.vit, self.norm, self.head = whole.vit, whole.norm, whole.head

    def forward(self, images):
        return self.head(self.norm(self.vit(images)))


def held_out():
    return DataLoader(samples(8, seed=1), batch_size=4)


def watching(folder=None, net=None, data=None, **options):
    """Return a watch of a new model, or of another one."""
    data = held_out() if data is None else data
    return Watch(Net() if net is None else net, data, folder, **{"on_error": "raise"} | options)


def accelerator(**options):
    """Return a new Accelerator, without the state of an earlier one in the process, as of a Trainer."""
    package = pytest.importorskip("accelerate", reason="accelerate is not installed")
    package.state.AcceleratorState._reset_state(reset_partial_state=True)
    package.state.GradientState._reset_state()
    return package.Accelerator(cpu=True, **options)
