"""The callback in a run that is resumed from a checkpoint, and what checkpoints can monitor."""

import shutil

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

import vitx
from tests import run_folders
from tests.lightning_models import fit, samples
from tests.played_runs import open_run
from tests.run_folders import events
from vitx.callbacks import RolloutCallback


def watching(**options):
    return RolloutCallback(num_images=2, on_error="raise", **options)


def stop(folder):
    """Train as `fit` does, save last.ckpt in the folder, and return the trainer."""
    trainer, _ = fit(watching(), default_root_dir=folder)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def resume(folder, *others, count=8, **options):
    """Train one more epoch from last.ckpt in the folder; the new root is its subfolder `resumed`."""
    data = DataLoader(samples(16), batch_size=4), DataLoader(samples(count, seed=1))
    settings = {"ckpt_path": folder / "last.ckpt", "default_root_dir": folder / "resumed"}
    fit(watching(**options), *others, data=data, max_epochs=3, **settings)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    stop(tmp_path)
    resume(tmp_path)
    found = run_folders.steps(tmp_path)
    assert found == [0, 3, 7, 11], "in the same folder; what was shown before the stop is not shown again"
    assert list(open_run(tmp_path).numbers["vitx/rollout/entropy"]) == found


def test_a_resumed_run_whose_folder_is_gone(tmp_path, caplog):
    stop(tmp_path)
    shutil.rmtree(tmp_path / "version_0")
    with caplog.at_level("INFO"):
        resume(tmp_path)
    assert run_folders.steps(tmp_path / "resumed") == [11]
    assert "version_0/vitx is gone" in caplog.text


def test_a_checkpoint_from_which_two_go_on(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last", save_top_k=-1, every_n_train_steps=4)
    fit(watching(), keep, default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=True)
    for _ in range(2):
        resume(tmp_path)
    assert run_folders.steps(tmp_path / "version_0") == [0, 3, 7, 11]
    assert run_folders.steps(tmp_path / "version_1") == [0, 3, 7, 11], "what the first one found stays"


def test_a_checkpoint_of_another_version_does_not_stop_a_resume(tmp_path):
    stop(tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt")
    state = checkpoint["callbacks"]["RolloutCallback"]
    del state["scalars"]
    state["indices"] = (1, 2)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    resume(tmp_path)
    assert run_folders.steps(tmp_path) == [0, 3, 7, 11]


def test_says_when_the_data_set_has_changed(tmp_path):
    stop(tmp_path)
    with pytest.warns(UserWarning, match="the data set has changed"):
        resume(tmp_path, count=12)


@pytest.mark.parametrize("state", [{}, {"foo": 1}, None])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(
        vitx.VitxError, match=r"RolloutCallback needs what its state_dict\(\) returned, found"
    ):
        RolloutCallback().load_state_dict(state)


def test_checkpoints_and_early_stopping_can_monitor_the_numbers(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="vitx/grad_rollout/pointing", mode="max", filename="best")
    named = {"filename": "often-{step}", "save_top_k": -1}
    often = ModelCheckpoint(tmp_path, monitor="vitx/rollout/entropy", every_n_train_steps=3, **named)
    early = EarlyStopping("vitx/rollout/information", mode="max", patience=1, min_delta=1)
    callback = RolloutCallback(on_error="raise", every_n_steps=3)
    settings = {"default_root_dir": tmp_path, "enable_checkpointing": True, "max_epochs": 9}
    trainer, _ = fit(best, often, early, callback, **settings)
    assert trainer.current_epoch == 2, "the early stopping did not see that the number stays the same"
    assert (tmp_path / "best.ckpt").exists()
    assert sorted(path.name for path in tmp_path.glob("often*")) == ["often-step=3.ckpt", "often-step=6.ckpt"]
    assert 0 <= best.best_model_score <= 1


def test_a_resumed_run_can_monitor_numbers_of_before(tmp_path):
    """This holds even if the callback does not fire again before the epoch ends."""
    trainer = stop(tmp_path)
    before = {name: value.item() for name, value in trainer.callback_metrics.items() if "vitx/" in name}

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.found = {name: trainer.callback_metrics[name].item() for name in before}

    look = Look()
    resume(tmp_path, look, every_n_epochs=100)
    assert look.found == before


def test_a_checkpoint_of_the_validation_sees_the_numbers_of_its_own_epoch(tmp_path):
    kept = {"save_top_k": -1, "save_on_train_epoch_end": False}
    keep = ModelCheckpoint(tmp_path, monitor="vitx/grad_rollout/energy", **kept)
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(keep, RolloutCallback(on_error="raise"), logger=logger, enable_checkpointing=True)
    _, *logged = events(logger.log_dir).Scalars("vitx/grad_rollout/energy")
    found = [score.item() for score in keep.best_k_models.values()]
    assert found == pytest.approx([event.value for event in logged])
