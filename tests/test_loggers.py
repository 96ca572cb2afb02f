"""Every logger with its real library, in whole runs, and what happens when a logger fails."""

import csv
import errno
import json
import logging
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.lightning_models import SmallClassifier, fit, samples
from tests.run_folders import events, kept
from vitx.callbacks import RolloutCallback
from vitx.files import encode, write_atomically
from vitx.watch.loggers import drop_from, facts_of, settings_of, show_picture, write_scalars

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
FIRINGS = [0, 3, 7]  # the steps of `fit`: before the first step, and after both epochs
TWIN = "pytorch_lightning, the package under its old name, is not installed"


class Bare(Logger):
    """A logger of numbers that implements only what a logger must."""

    name, version = "bare", 0

    def __init__(self):
        super().__init__()
        self.scalars = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        self.scalars += [(name, step) for name in metrics]

    def steps(self, name):
        return [step for scalar, step in self.scalars if scalar == name]


class Own(Bare):
    """A logger that holds pictures, too."""

    def __init__(self):
        super().__init__()
        self.pictures = []

    def log_image(self, key, images, step):
        if key == "vitx/maps":  # not the overview at the end
            self.pictures += [(key, step, image) for image in images]


class Failing(Own):
    """A logger that fails for everything that the callback gives it."""

    def log_metrics(self, metrics, step=None):
        if "vitx/rollout/entropy" in metrics:
            self.log_image(None, None, step)

    def log_image(self, key, images, step):
        raise ConnectionError(f"the server is away at step {step}")


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


def end(wandb):
    """End a run and wait for wandb's process, which may still write after `finish`."""
    wandb.finish()
    wandb.teardown()


def callback(**options):
    return RolloutCallback(num_images=2, **({"on_error": "raise", "save_maps": False} | options))


def train(library, module, *callbacks, ckpt_path=None, **options):
    """Train as `fit` does, with either package, and optionally from a checkpoint."""
    trainer = library.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    data, validation = (DataLoader(samples(count, seed), batch_size=4) for count, seed in ((16, 0), (8, 1)))
    trainer.fit(module, data, validation, ckpt_path=ckpt_path)


def steps(points):
    return [point.step for point in points]


def pixels(path):
    return np.asarray(Image.open(path))


def files(folder):
    return sorted(path.name for path in folder.rglob("maps-*.png"))


def numbered(steps):
    return [f"maps-{step:06d}.png" for step in steps]


def make_older(folder):
    """Make event files a second older: they are ordered by the seconds in their names."""
    for path in folder.rglob("events.out.tfevents.*"):
        *before, seconds, rest = path.name.split(".", 4)
        path.rename(path.with_name(".".join([*before, f"{int(seconds) - 1}", rest])))


def save_picture(path, picture):
    write_atomically(path, lambda file: encode(file, picture))


@contextmanager
def said():
    """Collect the warnings of the callback."""
    sentences = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield sentences
    sentences += [str(w.message) for w in caught if "RolloutCallback" in str(w.message)]


def test_a_picture_comes_out_of_tensorboard_as_it_went_in(tmp_path):
    """The picture is the same except for JPEG's rounding, which is invisible."""
    logger, places = TensorBoardLogger(tmp_path), np.mgrid[:120, :80]
    picture = np.stack([2 * places[0], 3 * places[1], places.sum(0)], -1).astype(np.uint8)
    assert show_picture(logger, "vitx/maps", picture, 7)
    (event,) = events(logger.log_dir).Images("vitx/maps")
    (tmp_path / "out.jpg").write_bytes(event.encoded_image_string)
    assert (event.step, event.height, event.width) == (7, 120, 80)
    assert np.abs(pixels(tmp_path / "out.jpg").astype(int) - picture).max() <= 6


def test_tensorboard_drops_what_an_ended_run_wrote_at_later_steps(tmp_path):
    def write(logger, steps, value):
        for step in steps:
            write_scalars(logger, {"vitx/rollout/entropy": value}, step)
            show_picture(logger, "vitx/maps", PICTURE, step)
        logger.finalize("success")

    write(TensorBoardLogger(tmp_path, version=0), range(10), value=1)
    make_older(tmp_path)
    again = TensorBoardLogger(tmp_path, version=0)
    drop_from(again, 5)
    write(again, range(5, 8), value=2)

    found = events(again.log_dir)
    scalars = found.Scalars("vitx/rollout/entropy")
    assert steps(scalars) == steps(found.Images("vitx/maps")) == list(range(8))
    assert [point.value for point in scalars] == [1] * 5 + [2] * 3


def test_a_run_resumed_in_the_same_folder_shows_each_step_once(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train(pl, SmallClassifier(), callback(), keep, logger=TensorBoardLogger(tmp_path, version=0))
    make_older(tmp_path)
    again, own = TensorBoardLogger(tmp_path, version=0), Own()
    loggers, stopped = [again, own, CSVLogger(tmp_path)], tmp_path / "epoch=0.ckpt"
    train(pl, SmallClassifier(), callback(), logger=loggers, ckpt_path=stopped)
    found = events(again.log_dir)
    assert steps(found.Images("vitx/maps")) == steps(found.Scalars("vitx/rollout/entropy")) == FIRINGS
    assert steps(found.Scalars("val/loss")) == FIRINGS[1:]
    assert steps(found.Scalars("train/loss")) == list(range(8))
    assert own.steps("vitx/rollout/entropy") == [7], "the second run is not resumed"


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


def history(run):
    """Return the rows of an offline run of Weights & Biases, whose file is a log in LevelDB's format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if (room := -at % 2**15) < 7:  # what is left of a block of 32 KiB is too small for a header: padding
            at += room
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            rows.append({"/".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return rows


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
    train(twin, Classifier(), best, callback(), logger=logger)
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


def test_a_picture_comes_out_of_a_file_as_it_went_in(tmp_path):
    save_picture(tmp_path / "deep" / "maps.png", PICTURE)
    assert np.array_equal(pixels(tmp_path / "deep" / "maps.png"), PICTURE)


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


@contextmanager
def full_disk(room):
    """Limit the size of files to some bytes."""
    resource = pytest.importorskip("resource", reason="this system has no limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "maps.png"
    save_picture(path, PICTURE)
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(OSError, match="too large"):
        save_picture(path, PICTURE // 2)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before
    save_picture(path, PICTURE // 2)
    assert path.read_bytes() != before
