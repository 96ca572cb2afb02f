"""What happens when a logger or a disk fails."""

import errno
import os
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest

from tests.lightning_models import fit
from tests.loggers import FIRINGS, Own, callback, files, numbered


class Failing(Own):
    """A logger that fails for everything that the callback gives it."""

    def log_metrics(self, metrics, step=None):
        if "vitx/rollout/entropy" in metrics:
            self.log_image(None, None, step)

    def log_image(self, key, images, step):
        raise ConnectionError(f"the server is away at step {step}")


@contextmanager
def said():
    """Collect the warnings of the callback."""
    sentences = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield sentences
    sentences += [str(w.message) for w in caught if "RolloutCallback" in str(w.message)]


def test_a_logger_that_fails_is_named_once_and_the_others_get_theirs(tmp_path):
    own = Own()
    with said() as sentences:
        trainer, _ = fit(callback(on_error="warn"), logger=[Failing(), own], default_root_dir=tmp_path)
    (sentence,) = sentences
    assert (
        sentence == "RolloutCallback cannot write to Failing: ConnectionError: the server is away at step 0"
    )
    assert trainer.global_step == 8
    assert own.steps("vitx/rollout/entropy") == [step for _, step, _ in own.pictures] == FIRINGS
    assert not files(tmp_path)


def test_where_the_only_logger_fails_there_are_files(tmp_path):
    with said() as sentences:
        fit(callback(on_error="warn"), logger=Failing(), default_root_dir=tmp_path)
    assert len(sentences) == 1
    assert files(tmp_path) == numbered(FIRINGS)


def forbid(tmp_path, _):
    (tmp_path / "runs").write_text("a file where the folder should be")


def fill_disk(_, monkeypatch):
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))


@pytest.mark.parametrize("spoil", [forbid, fill_disk])
def test_a_folder_that_cannot_be_written_is_named_once_and_training_goes_on(spoil, tmp_path, monkeypatch):
    spoil(tmp_path, monkeypatch)
    with said() as sentences:
        trainer, _ = fit(callback(on_error="warn", save_maps=True), default_root_dir=tmp_path / "runs")
    (sentence,) = sentences
    assert sentence.startswith(f"RolloutCallback cannot write to {tmp_path / 'runs'}: ")
    assert trainer.global_step == 8
    assert not list(tmp_path.rglob("version_*")), "something is left behind"


@pytest.mark.parametrize("spoil", [forbid, fill_disk, None])
def test_a_sink_that_fails_stops_the_training_where_told(spoil, tmp_path, monkeypatch):
    if spoil is not None:
        spoil(tmp_path, monkeypatch)
    with pytest.raises(OSError, match=r"exists|space|away"):
        fit(callback(), logger=spoil is None and Failing(), default_root_dir=tmp_path / "runs")
