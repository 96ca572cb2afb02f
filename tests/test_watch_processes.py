"""A watch in two processes."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests import run_folders
from tests.lightning_models import samples
from tests.loops import Net
from tests.processes import run_together
from tests.run_folders import shown
from tests.training import assert_same
from vitx import Watch

WATCHED = {"num_images": 5, "on_error": "raise"}


def in_each_rank(folder: Path) -> None:
    """Run all checks that need two processes in one go, as starting them takes long."""
    torch.distributed.init_process_group("gloo")
    shares_the_images(folder)
    if not torch.__version__.startswith("2.6"):  # its fully_shard does not run on a CPU
        runs_a_sharded_model_in_step(folder)


def runs_a_sharded_model_in_step(folder: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    for part in (*net.vit.blocks, net):
        fully_shard(part)
    assert Watch(net, DataLoader(samples(8, seed=1)), folder / "sharded", **WATCHED)(0)


def shares_the_images(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    sampler = torch.utils.data.distributed.DistributedSampler(samples(8, seed=1), shuffle=False)
    loader = DataLoader(samples(8, seed=1), batch_size=2, sampler=sampler)
    outcomes = []
    for watched in (False, True):
        torch.manual_seed(rank)
        net = copy.deepcopy(model)
        watch = Watch(net, loader, folder / "two", **WATCHED) if watched else None
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        if watch:
            numbers = watch(0)
        for step in range(2):
            images, labels, _ = next(iter(loader))
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            if watch:
                numbers = watch(step + 1)
        outcomes.append({**net.state_dict(), "random": torch.rand(2)})
    assert_same(*outcomes)
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, dict(numbers))
    assert everywhere[0] == everywhere[1]
    assert "vitx/rollout/drift" in numbers


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_together(2, in_each_rank, tmp_path)
    assert shown(tmp_path / "two") == [0, 1, 2]
    torch.manual_seed(0)
    Watch(Net(), DataLoader(samples(8, seed=1)), tmp_path / "one", **WATCHED)(0)
    one, two = (run_folders.firing(tmp_path / kind, 0) for kind in ("one", "two"))
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in two.items()}
    if (tmp_path / "sharded").exists():
        sharded = run_folders.firing(tmp_path / "sharded", 0)
        assert all(np.allclose(one[name], sharded[name], rtol=1e-3, atol=1e-6) for name in one)
