"""Every logger with its real library, in whole runs."""

import csv
import logging
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from torch.nn import functional as F

from tests.lightning_models import SmallClassifier, fit
from tests.loggers import FIRINGS, TWIN, Bare, Own, callback, files, numbered, pixels, steps
from tests.run_folders import events, kept
from tests.weights_and_biases import end, history
from vitx.watch.loggers import facts_of, settings_of


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """Isolate loggers: they write to the working directory, set environment variables and call home."""
    monkeypatch.chdir(tmp_path)
    quiet = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    homes = {f"WANDB_{kind}_DIR": str(tmp_path / "home") for kind in ("CONFIG", "CACHE", "DATA")}
    with mock.patch.dict(os.environ, quiet | homes):
        yield


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def loggers(request):
    """Return the loggers of each package, whose classes are unrelated."""
    return pytest.importorskip(f"{request.param}.loggers", reason=TWIN)


@pytest.fixture
def wandb():
    library = pytest.importorskip("wandb", reason="wandb is not installed")
    yield library
    end(library)


def test_tensorboard_and_csv_hold_what_they_can(loggers, tmp_path):
    tensorboard, table, own = loggers.TensorBoardLogger(tmp_path), loggers.CSVLogger(tmp_path), Own()
    fit(callback(), logger=[tensorboard, table, own])
    found = events(tensorboard.log_dir)
    rows = list(csv.DictReader(Path(table.log_dir, "metrics.csv").read_text().splitlines()))
    for name, expected in {"vitx/rollout/entropy": FIRINGS, "val/loss": FIRINGS[1:]}.items():
        assert steps(found.Scalars(name)) == expected
        assert [int(row["step"]) for row in rows if row[name]] == expected
        assert own.steps(name) == expected
    assert steps(found.Images("vitx/maps")) == [step for _, step, _ in own.pictures] == FIRINGS
    assert not files(tmp_path), "a logger holds the pictures: no file is needed"


def test_weights_and_biases_holds_pictures_and_scalars_at_the_steps_of_self_log(loggers, wandb, tmp_path):
    quiet = wandb.Settings(console="off", silent=True)
    logger, own = loggers.WandbLogger(offline=True, save_dir=tmp_path, settings=quiet), Own()
    fit(callback(), logger=[logger, own])
    end(wandb)

    (run,) = tmp_path.glob("wandb/offline-run-*")
    rows = history(run)
    for name, expected in {
        "vitx/rollout/entropy": FIRINGS,
        "vitx/grad_rollout/energy": FIRINGS,
        "vitx/maps/filenames": FIRINGS,
        "vitx/rollout/drift": FIRINGS[1:],
        "val/loss": FIRINGS[1:],
    }.items():
        assert [row["trainer/global_step"] for row in rows if name in row] == expected, name
    shown = [row for row in rows if "vitx/maps/filenames" in row]
    for row, (_, _, picture) in zip(shown, own.pictures, strict=True):
        (name,) = row["vitx/maps/filenames"]
        assert np.array_equal(pixels(run / "files" / name), picture)
        assert (row["vitx/maps/height"], row["vitx/maps/width"]) == picture.shape[:2]
    assert len(list(run.glob("files/media/images/vitx/maps*"))) == 3
    assert not files(tmp_path)


def test_mlflow_holds_pictures_and_scalars_and_no_picture_twice(loggers, mlflow, tmp_path):
    store = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_location": f"{tmp_path}/artifacts"}
    logger, own = loggers.MLFlowLogger(**store), Own()
    fit(callback(), logger=[logger, own])
    (loaded := tmp_path / "loaded").mkdir()
    client, run = mlflow.MlflowClient(store["tracking_uri"]), logger.run_id
    for name, expected in {"vitx/rollout/entropy": FIRINGS, "val/loss": FIRINGS[1:]}.items():
        assert steps(client.get_metric_history(run, name)) == expected
    first = sorted(f.path for f in client.list_artifacts(run, "images") if "~maps" in f.path)
    for _, step, picture in own.pictures:
        small, full = (path for path in first if f"vitx~maps+step+{step}+" in path)
        assert small.endswith(".webp")
        assert np.array_equal(pixels(client.download_artifacts(run, full, loaded)), picture)
    assert len(first) == 2 * len(FIRINGS)

    again = loggers.MLFlowLogger(**store, run_id=run)
    fit(callback(), logger=again)
    assert sorted(f.path for f in client.list_artifacts(run, "images") if "~maps" in f.path) == first
    assert len(client.get_metric_history(run, "vitx/rollout/entropy")) == 6, "the second run is not this one"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "artifacts", "loaded"}


def test_serves_a_trainer_of_pytorch_lightning(tmp_path):
    twin = pytest.importorskip("pytorch_lightning", reason=TWIN)

    class Classifier(twin.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = SmallClassifier()

        def forward(self, images):
            return self.model(images)

        def training_step(self, batch, _):
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return self.model.configure_optimizers()

    logger = twin.loggers.TensorBoardLogger(tmp_path)
    best = twin.callbacks.ModelCheckpoint(tmp_path, monitor="vitx/rollout/entropy")
    fit(best, callback(), module=Classifier, library=twin, logger=logger, enable_checkpointing=True)
    found = events(logger.log_dir)
    scalars = found.Scalars("vitx/rollout/entropy")
    assert steps(scalars) == steps(found.Images("vitx/maps")) == FIRINGS
    assert steps(found.Scalars("val/loss")) == FIRINGS[1:]
    lowest = min(scalars[1:], key=lambda point: point.value)
    assert best.best_model_score.item() == pytest.approx(lowest.value, abs=1e-9)
    assert best.best_model_path.endswith(f"step={lowest.step + 1}.ckpt")


def test_what_loggers_tell_of_a_run(wandb, mlflow, tmp_path):
    run = wandb.init(mode="offline", dir=tmp_path, name="mine", config={"lr": 1})
    assert settings_of(run) == {"lr": 1}
    assert (facts_of(run)["title"], facts_of(run)["version"]) == ("mine", run.id)
    wandb.finish()
    loggers = (
        TensorBoardLogger(tmp_path),
        CSVLogger(tmp_path),
        MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/m.db", run_name="mine"),
    )
    for logger in loggers:
        logger.log_hyperparams({"lr": 1})
        assert settings_of(logger) in ({"lr": 1}, {"lr": "1"})
    assert [facts_of(logger)["title"] for logger in loggers] == [None, None, "mine"]
    assert facts_of(loggers[2])["version"] == loggers[2].run_id


def test_a_logger_of_ones_own_needs_but_log_image(tmp_path):
    own = Own()
    assert not hasattr(own, "experiment")
    fit(callback(), logger=own, default_root_dir=tmp_path)
    assert own.steps("vitx/rollout/entropy") == FIRINGS
    assert [(key, step) for key, step, _ in own.pictures] == [("vitx/maps", step) for step in FIRINGS]
    assert all(picture.dtype == np.uint8 and picture.ndim == 3 for _, _, picture in own.pictures)
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "make", [lambda: False, Bare, lambda: CSVLogger("here")], ids=["none", "bare", "csv"]
)
def test_without_a_logger_for_pictures_there_are_files(make, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vitx")
    logger = make()
    fit(callback(), logger=logger, default_root_dir=tmp_path)
    assert files(tmp_path) == numbered(FIRINGS)
    folder = kept(tmp_path)
    where = {False: "version_0"}.get(logger) or Path(logger.save_dir or "", logger.name, "version_0")
    assert folder == tmp_path / where / "vitx", "they are not in the folder of the logger"
    (said,) = {record.message for record in caplog.records if "watches" in record.message}
    assert Path(said.rsplit("pictures: ")[-1]).resolve() == folder
