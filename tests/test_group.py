"""Two processes that train together with DDP on gloo."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard

import vitx
from tests import run_folders
from tests.lightning_models import SmallClassifier, fit, samples
from tests.processes import run_together
from tests.run_folders import kept
from tests.training import Setting, assert_same, train
from vitx.callbacks import RolloutCallback
from vitx.watch.host import Group

SHARDS = not torch.__version__.startswith("2.6")  # whose fully_shard does not run on CPUs
WATCHED = {"num_images": 5, "on_error": "raise"}


class FailsOnOneRank:
    def __call__(self, logits):
        if os.environ["RANK"] == "1":
            raise RuntimeError("rank 1 has no picture today")
        return logits[:, 0]


def ddp(**options):
    return {
        "strategy": DDPStrategy(process_group_backend="gloo"),
        "devices": 2,
        "accelerator": "cpu",
    } | options


def in_each_rank(folder: Path) -> None:
    """Run everything that needs two processes in one start, which takes long."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RolloutCallback")
        leaves_no_trace(folder / "trace")
        equals_one_process(folder)
        serves_more_ranks_than_images(folder / "few")
        if SHARDS:
            explains_a_sharded_model(folder / "sharded")
    one_rank_fails(folder / "failing")
    images_cannot_be_chosen(folder / "no images")


def leaves_no_trace(folder):
    for callback in ({"every_n_steps": 1}, {"every_n_epochs": 1, "num_images": 5}):
        setting = Setting(ddp())
        watched = train(setting, folder, RolloutCallback(on_error="raise", **callback))
        setting = Setting(ddp())
        assert_same(train(setting, folder), watched)


def equals_one_process(folder):
    # Without validation, in which the ranks would share BatchNorm's statistics.
    settings = ddp(max_epochs=1, check_val_every_n_epoch=2, default_root_dir=folder / "two")
    trainer, module = fit(RolloutCallback(**WATCHED), **settings)
    scalars = {name: value.item() for name, value in trainer.callback_metrics.items() if "vitx/" in name}
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "two" / "end.pt")
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, scalars)
    assert everywhere[0] == everywhere[1], "a monitor would see other numbers on another rank"
    assert scalars


def serves_more_ranks_than_images(folder):
    fit(RolloutCallback(num_images=1, on_error="raise"), default_root_dir=folder, **ddp(max_epochs=1))


class Sharded(SmallClassifier):
    """A model of which each rank keeps half of the weights of each block."""

    def configure_model(self):
        if not isinstance(self.head, FSDPModule):
            for part in (*self.vit.blocks, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def explains_a_sharded_model(folder):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
    )
    callback = RolloutCallback(**WATCHED)
    settings = ddp(strategy=strategy, max_epochs=1, default_root_dir=folder)
    fit(callback, module=Sharded, **settings)


def one_rank_fails(folder):
    first = os.environ["RANK"] == "0"  # this rank warns for all
    with pytest.warns(UserWarning, match="rank 1 has no picture") if first else warnings.catch_warnings():
        watched = RolloutCallback(target=FailsOnOneRank(), methods=["grad_rollout"])
        trainer, _ = fit(watched, default_root_dir=folder, **ddp())
    assert trainer.global_step == 4, "the training did not go on"
    with pytest.raises(Exception, match="rank 1 has no picture today"):
        fit(RolloutCallback(target=FailsOnOneRank(), on_error="raise"), default_root_dir=folder, **ddp())


def images_cannot_be_chosen(folder):
    trainer, _ = fit(RolloutCallback(images=[999]), default_root_dir=folder, **ddp())
    assert trainer.global_step == 4, "the training did not go on"


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_together(2, in_each_rank, tmp_path)

    assert run_folders.steps(tmp_path / "two") == [0, 1]
    fit(RolloutCallback(**WATCHED), default_root_dir=tmp_path / "one", max_epochs=1)
    one, two = (kept(tmp_path / kind) for kind in ("one", "two"))
    for name in ("images-000000.npz", "firing-000000.npz"):  # before the weights differ
        assert (one / name).read_bytes() == (two / name).read_bytes()
    if SHARDS:
        one, sharded = (run_folders.firing(tmp_path / kind, 0) for kind in ("one", "sharded"))
        for method in one:
            assert np.allclose(one[method], sharded[method], rtol=1e-3, atol=1e-6)
    found = run_folders.firing(tmp_path / "two", 1)
    del found["logits"], found["sinks"]
    model, data = SmallClassifier(), samples(8, seed=1)
    model.load_state_dict(torch.load(tmp_path / "two" / "end.pt"))
    images = torch.stack([data[place][0] for place in (0, 2, 4, 5, 7)])
    for method, maps in found.items():
        expected = vitx.explain(model, images, method).maps
        assert torch.allclose(torch.from_numpy(maps).float(), expected, rtol=1e-3, atol=1e-6)

    assert run_folders.steps(tmp_path / "few") == [0, 1]
    for name in ("failing", "no images"):
        assert not list((tmp_path / name).rglob("vitx"))


@pytest.mark.parametrize(("ranks", "count"), [(1, 5), (2, 5), (3, 8), (4, 2), (8, 0)])
def test_every_image_is_one_ranks(ranks, count):
    shares = [range(count)[Group(rank, ranks).share(count)] for rank in range(ranks)]
    assert [place for part in shares for place in part] == list(range(count))
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1
