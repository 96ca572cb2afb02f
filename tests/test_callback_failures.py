"""What fails in the callback is said once, and neither the training nor the rest of the maps is lost."""

import sys
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from tests import run_folders
from tests.lightning_models import IMAGE, SmallClassifier, fit
from tests.run_folders import events, firing, kept
from vitx.callbacks import RolloutCallback


def test_the_images_are_kept_also_where_the_first_firing_fails(tmp_path, failing):
    failing.times = 2  # with the others, and when tried alone
    callback = RolloutCallback(methods=["rollout", "failing"], num_images=2)
    with pytest.warns(UserWarning, match="no map today"):
        fit(callback, default_root_dir=tmp_path)
    assert np.load(kept(tmp_path) / "images-000000.npz")["pixels"].shape == (2, IMAGE, IMAGE, 3)
    assert list(firing(tmp_path, 0)) == ["rollout", "logits", "sinks"]
    assert list(firing(tmp_path, 7)) == ["rollout", "failing", "logits", "sinks"]


class Probe(SmallClassifier):
    """A module without gradients before its head."""

    def forward(self, images):
        with torch.no_grad():
            features = self.vit(images)
        return self.head(self.norm(features))


@pytest.mark.usefixtures("failing")
def test_a_method_that_fails_takes_no_other_with_it(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    with pytest.warns(UserWarning, match="shows no failing method at step 0: RuntimeError: no map today"):
        fit(RolloutCallback(methods=["rollout", "failing", "grad_rollout"]), logger=logger)
    found = events(logger.log_dir)
    assert len(found.Images("vitx/maps")) == 3
    assert "vitx/rollout/entropy" in found.scalars.Keys()
    assert "vitx/grad_rollout/entropy" in found.scalars.Keys()
    assert "vitx/failing/entropy" not in found.scalars.Keys()


def test_a_target_that_fails_leaves_no_method(tmp_path):
    """Every method begins where the score is read."""

    def target(logits):
        raise RuntimeError("no score today")

    logger = TensorBoardLogger(tmp_path, name="run")
    sentence = "shows nothing at step 0: the target function failed on .* no score today"
    with pytest.warns(UserWarning, match=sentence):
        fit(RolloutCallback(target=target), logger=logger)
    assert not [name for name in events(logger.log_dir).scalars.Keys() if "rollout" in name]


def test_a_probe_without_gradients_is_shown(tmp_path):
    fit(RolloutCallback(on_error="raise", methods=["rollout"]), module=Probe, default_root_dir=tmp_path)
    assert run_folders.steps(tmp_path)


def test_a_picture_that_fails_takes_no_number_with_it(tmp_path):
    trainer = None
    with pytest.warns(UserWarning, match="shows no picture at step 0: bands must be one or three channels"):
        trainer, _ = fit(RolloutCallback(bands=(7,)), default_root_dir=tmp_path)
    assert "vitx/rollout/entropy" in trainer.callback_metrics


def test_is_heard_where_warnings_are_silenced(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(RolloutCallback(bands=(7,)))
    assert "RolloutCallback shows no picture" in caplog.text


def test_a_failing_explanation_warns_and_training_goes_on(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(sys.modules["vitx.watch.explaining"], "explain_methods", fail)
    with pytest.warns(UserWarning, match="no picture today"):
        trainer, watched = fit(RolloutCallback(), default_root_dir=tmp_path)
    assert trainer.global_step == 8
    _, plain = fit(default_root_dir=tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), f"{name} differs"
    with pytest.raises(RuntimeError, match="no picture today"):
        fit(RolloutCallback(on_error="raise"), default_root_dir=tmp_path)


def test_an_error_before_the_training_stays_its_own(tmp_path):
    class Broken(pl.LightningDataModule):
        def setup(self, stage):
            raise FileNotFoundError("no such folder")

    trainer = pl.Trainer(accelerator="cpu", callbacks=[RolloutCallback()], default_root_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        trainer.fit(SmallClassifier(), datamodule=Broken())


def test_a_method_that_fails_is_tried_with_the_others_and_alone(tmp_path, failing):
    callback = RolloutCallback(methods=["rollout", "failing"], every_n_steps=1)
    with pytest.warns(UserWarning, match="no map today"):
        trainer, _ = fit(callback, default_root_dir=tmp_path)
    assert failing.calls == 2 * 8, "not at each of 8 firings"
    assert "vitx/rollout/entropy" in trainer.callback_metrics


def test_each_error_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["vitx.watch.explaining"], "explain_methods", lambda *_, **__: 1 / 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(RolloutCallback(every_n_steps=1), default_root_dir=tmp_path)
    assert len([w for w in said if "RolloutCallback shows nothing" in str(w.message)]) == 1
