"""After a kill -9 and a resume, no events or files are duplicated, missing or torn."""

import io
import os
import signal
import time
from collections import Counter
from pathlib import Path
from shutil import copytree

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.data import DataLoader

from tests import run_folders
from tests.lightning_models import IMAGE, fit, samples
from tests.played_runs import open_run
from tests.processes import FORKED
from vitx.callbacks import RolloutCallback

pytestmark = pytest.mark.slow

LOGGERS = {"tensorboard": TensorBoardLogger, "csv": CSVLogger}
STEPS = list(range(20))
EPOCH_ENDS = STEPS[4::5]
FIRINGS = sorted({0, *STEPS[1::2], *EPOCH_ENDS})  # at the start, after every second step and every epoch
LAST = 13  # the firing after which the run is killed, two steps after its last checkpoint
PATIENCE = 120  # seconds
WAITS = "waits"  # the file that a run creates when it waits


class Slow(pl.Callback):
    """A callback that takes time, since event files differ by their second, and then waits to be killed."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.1)
        if trainer.global_step > LAST:
            Path(trainer.default_root_dir, WAITS).touch()
            time.sleep(PATIENCE)


def train(folder, logger, *callbacks, checkpoint=None):
    """Train for four epochs of five steps, with checkpoints of all kinds."""
    kinds = {
        "step": {"every_n_train_steps": 3, "save_last": True},
        "validation": {"monitor": "val/loss", "save_on_train_epoch_end": False},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }
    keep = [
        ModelCheckpoint(folder, f"{kind}-{{step}}", save_top_k=-1, auto_insert_metric_name=False, **options)
        for kind, options in kinds.items()
    ]
    callback = RolloutCallback(num_images=1, every_n_steps=2, on_error="raise")
    options = {"logger": LOGGERS[logger](folder, name="run", version=0), "default_root_dir": folder}
    data = tuple(DataLoader(samples(size), batch_size=4) for size in (20, 4))
    saving = {"max_epochs": 4, "enable_checkpointing": True, "ckpt_path": checkpoint}
    fit(callback, *callbacks, *keep, data=data, **saving, **options)


def train_slowly(folder, logger):
    torch.set_num_threads(1)
    train(folder, logger, Slow())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folders of two runs, one with each logger, that were killed midway."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LOGGERS}
    runs = {
        name: FORKED.Process(target=train_slowly, args=(folder, name)) for name, folder in folders.items()
    }
    for run in runs.values():
        run.start()
    try:
        for name, run in runs.items():
            deadline = time.monotonic() + PATIENCE
            while not (folders[name] / WAITS).exists():
                assert run.is_alive(), "the run ended by itself"
                assert time.monotonic() < deadline, "the run hangs"
                time.sleep(0.02)
            run.kill()
            run.join()
            assert run.exitcode == -signal.SIGKILL
    finally:
        for run in runs.values():
            run.kill()
            run.join()
    return folders


def tear(folder):
    """Truncate what was written last, as if the run had been killed while writing it."""
    for path in (folder / "vitx").glob(f"*-{LAST:06d}.*"):
        os.truncate(path, path.stat().st_size - 7)
        path.rename(path.with_name(f".{path.name}.part"))
    for path in folder.glob("events*"):
        os.truncate(path, path.stat().st_size - 7)


def resume(folder, logger, checkpoint, torn, tmp_path):
    """Resume in a copy of a killed run, and return the folder of its logger."""
    copytree(folder, tmp_path, dirs_exist_ok=True)  # the run resumes where its logger is
    if torn:
        tear(tmp_path / "run/version_0")
    train(tmp_path, logger, checkpoint=tmp_path / f"{checkpoint}.ckpt")
    return tmp_path / "run/version_0"


def steps_of_files(folder):
    """Read everything that was saved, which must be complete, and return the steps of the maps."""
    run = open_run(folder)
    assert run.pixels.shape == (1, IMAGE, IMAGE, 3)
    assert all(np.isfinite(maps).all() for maps in run.maps.values())
    assert list(run.numbers["vitx/rollout/entropy"]) == list(run.steps)
    return list(run.steps)


def doubled(folder):
    """Return the tags that have a step twice in the event files themselves."""
    counts = Counter(
        (value.tag, event.step)
        for path in folder.glob("events*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    )
    return {tag for (tag, _), count in counts.items() if count > 1}


@pytest.mark.parametrize(
    ("checkpoint", "torn"), [("last", False), ("step-6", True), ("epoch-5", False), ("validation-5", False)]
)
def test_tensorboard_shows_each_step_once_and_in_order(checkpoint, torn, killed, tmp_path):
    folder = resume(killed["tensorboard"], "tensorboard", checkpoint, torn, tmp_path)
    shown = run_folders.events(folder)
    steps = {tag: [event.step for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}
    of_vitx = {tag: found for tag, found in steps.items() if tag.startswith("vitx/")}
    pictures = shown.Images("vitx/maps")

    assert {"train/loss", "vitx/maps", "vitx/rollout/entropy"} <= doubled(folder)
    assert steps["train/loss"] == STEPS
    assert steps["val/loss"] == EPOCH_ENDS
    assert len(of_vitx) == 9  # for one image
    for tag, found in of_vitx.items():
        assert found == (FIRINGS[1:] if tag.endswith("drift") else FIRINGS), tag
    assert [picture.step for picture in pictures] == FIRINGS
    for picture in pictures:
        Image.open(io.BytesIO(picture.encoded_image_string)).load()
    assert steps_of_files(folder / "vitx") == FIRINGS


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
def test_there_is_one_whole_file_of_each_step(torn, killed, tmp_path):
    folder = resume(killed["csv"], "csv", "last", torn, tmp_path)
    assert steps_of_files(folder / "vitx") == FIRINGS
