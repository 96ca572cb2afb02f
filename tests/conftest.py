"""What all tests share: one thread, a fixed seed, and the real weights and pictures where there are any."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    """The models are tiny: threads would only cost time, and make sums depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def assets():
    """The folder with DeiT-Tiny's weights and ImageNet validation images; skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("VITX_ASSETS", beside))
    if not (folder / "deit_tiny_patch16_224.safetensors").is_file():
        pytest.skip("no real weights: set VITX_ASSETS to a folder with deit_tiny_patch16_224.safetensors")
    return folder
