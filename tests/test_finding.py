"""Runs are found and read wherever people log them, by the real libraries."""

import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from tests.lightning_models import fit
from tests.played_runs import grid, same, write_events, write_maps
from vitx.callbacks import RolloutCallback
from vitx.cli import main
from vitx.pictures.render import LINE
from vitx.runs.cutting import read_titles
from vitx.runs.finding import find_runs, name_runs, open_run, open_runs
from vitx.runs.playback import FromGrids, FromMaps

FIRINGS = (0, 3, 7)  # the steps of `fit`
TITLES = ["attention rollout", "gradient rollout"]
QUIET = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder that trainings are started in, as loggers write where they stand, and call home."""
    folder = tmp_path_factory.mktemp("home")
    before = Path.cwd()
    homes = {f"WANDB_{kind}_DIR": str(folder / "wandb-home") for kind in ("CONFIG", "CACHE", "DATA")}
    os.chdir(folder)
    with mock.patch.dict(os.environ, QUIET | homes):
        yield folder
    os.chdir(before)


def train(logger, folder, images, **options):
    logger.log_hyperparams({"lr": 0.1 * images, "model": {"depth": 3}})
    watching = RolloutCallback(num_images=images, save_maps=True, on_error="raise", **options)
    fit(watching, logger=logger, default_root_dir=folder)


def train_with_wandb(folder):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for images in (1, 2):
        settings = wandb.Settings(console="off", silent=True)
        logger = pl.loggers.WandbLogger(
            offline=True, save_dir=folder, name=f"try {images}", settings=settings
        )
        train(logger, folder, images, methods=("grad_rollout", "rollout"))
        wandb.finish()
        wandb.teardown()  # waits for its process
    return str(folder)


def train_with_mlflow(folder):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    store = f"sqlite:///{folder}/mlflow.db"
    for images in (1, 2):
        options = {"tracking_uri": store, "artifact_location": f"{folder}/artifacts"}
        train(pl.loggers.MLFlowLogger(run_name=f"try {images}", **options), folder, images)
    mlflow.set_tracking_uri(None)
    return store


@pytest.fixture(scope="module")
def wandb_place(home, tmp_path_factory):
    """Where two runs were logged, in one folder: its path or address, and the folder."""
    folder = tmp_path_factory.mktemp("wandb")
    return train_with_wandb(folder), folder


@pytest.fixture(scope="module")
def mlflow_place(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return train_with_mlflow(folder), folder


@pytest.fixture(params=["wandb_place", "mlflow_place"])
def place(request):
    return request.getfixturevalue(request.param)


def opened(place):
    found = find_runs([place])
    by_run = dict(open_runs(found))
    order = [one for one in found if one in by_run]
    return dict(zip(name_runs(order), (by_run[one] for one in order), strict=True))


def test_pictures_numbers_and_settings_are_read(place, tmp_path):
    address, folder = place
    aside = [folder / name for name in ("vitx", "vitx-1.zip")]
    kept = [path.rename(tmp_path / path.name) for path in aside]
    try:
        runs = opened(address)
    finally:
        for path, home in zip(kept, aside, strict=True):
            shutil.move(path, home)
    assert [name.split("/")[-1] for name in runs] == ["try 1", "try 2"]
    for images, run in enumerate(runs.values(), 1):
        assert isinstance(run.playback, FromGrids)
        assert (run.playback.steps, run.playback.count) == (FIRINGS, images)
        assert sorted(run.playback.titles) == TITLES
        assert run.scalars["val/loss"].steps == FIRINGS[1:]
        assert run.scalars["vitx/rollout/entropy"].steps == FIRINGS
        assert len(run.scalars["train/loss"].values) == 8
        (settings,) = run.config.values()
        assert f"lr: {0.1 * images}" in settings
        assert "depth: 3" in settings


def test_each_run_gets_the_maps_that_are_its_own(place):
    address, folder = place
    runs = opened(address)
    assert [name.split("/")[-1] for name in runs] == ["try 1", "try 2"], "a folder of maps passes for a run"
    for images, run in enumerate(runs.values(), 1):
        assert isinstance(run.playback, FromMaps)
        assert (run.playback.steps, run.playback.count) == (FIRINGS, images)
    saved = np.load(folder / "vitx" / "maps-000003.npz")
    assert same(run.playback.saved.maps["rollout"][1], saved["rollout"])


def test_a_place_may_be_named_from_where_one_is(place, monkeypatch):
    address, folder = place
    monkeypatch.chdir(folder)
    assert len(opened(".")) == 2
    assert len(opened("mlflow.db" if address.startswith("sqlite") else "wandb")) == 2


def test_maps_that_drew_other_pictures_are_nobodys(place, tmp_path):
    address, folder = place
    shutil.copytree(folder / "vitx", tmp_path / "vitx")
    try:
        for path in (folder / "vitx").glob("maps-*.npz"):
            np.savez(path, **{name: found[..., ::-1] for name, found in np.load(path).items()})
        runs = opened(address)
        kinds = [type(run.playback) for name, run in runs.items() if "try" in name]
        assert kinds == [FromMaps, FromGrids]
    finally:
        shutil.rmtree(folder / "vitx")
        shutil.move(tmp_path / "vitx", folder)


def test_they_are_reported_and_filmed(place, tmp_path):
    address, _ = place
    assert main(["report", address, "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "2 trainings compared" in page
    assert main(["timelapse", address, "--only", "*try 2", "--output", str(tmp_path / "film")]) == 0
    assert len(list((tmp_path / "film").iterdir())) == 5


def test_without_its_library_a_logger_is_named(place, tmp_path, monkeypatch, capsys):
    address, folder = place
    name, address = ("mlflow", address) if address.startswith("sqlite") else ("wandb", str(folder / "wandb"))
    for module in [name, *(one for one in sys.modules if one.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["report", address, "--output", str(tmp_path / "page.html")]) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wandb_run(wandb_place, tmp_path):
    """A copy of the second run of Weights & Biases."""
    source = sorted(wandb_place[1].glob("wandb/offline-run-*"))[-1]
    return Path(shutil.copytree(source, tmp_path / "wandb" / source.name))


def test_a_run_that_wandb_has_not_finished_is_read_as_far_as_it_goes(wandb_run):
    (file,) = wandb_run.glob("*.wandb")
    whole = open_run(wandb_run).scalars["train/loss"].values
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    part = open_run(wandb_run).scalars["train/loss"].values
    assert 0 < len(part) < len(whole)
    assert part == whole[: len(part)]


def test_a_run_that_was_resumed_in_wandb_is_one_and_the_last_holds(wandb_run):
    again = wandb_run.with_name("offline-run-20990101_000000-" + wandb_run.name.rpartition("-")[2])
    shutil.copytree(wandb_run, again)
    for picture in again.glob("files/media/**/*.png"):
        seen = np.asarray(Image.open(picture)).copy()
        seen[:LINE] = 255  # no titles, to tell it by
        Image.fromarray(seen).save(picture)
    run = open_run(wandb_run.parent)
    assert run.playback.steps == FIRINGS
    assert run.playback.titles == ["column 1", "column 2"]


@pytest.mark.parametrize(
    "spoil", [lambda data: b"nothing" + data, lambda data: data[:7] + b"\0\0\0\0\4\0\1abcd"]
)
def test_a_file_that_is_not_wandbs_is_named(spoil, wandb_run, capsys, tmp_path):
    (file,) = wandb_run.glob("*.wandb")
    file.write_bytes(spoil(file.read_bytes()))
    assert main(["report", str(wandb_run), "--output", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert file.name in said
    assert said.count("\n") == 1


def test_what_is_damaged_takes_nothing_else_with_it(wandb_run, tmp_path, capsys):
    (file,) = wandb_run.glob("*.wandb")
    file.write_bytes(b"nothing")
    write_events(tmp_path / "one")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 1
    assert f"left out wandb/{wandb_run.name}: " in capsys.readouterr().err
    assert "one: what the model looks at" in (tmp_path / "page.html").read_text("utf-8")


def test_folders_of_an_earlier_mlflow_are_read(home, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    with mock.patch.dict(os.environ, {"MLFLOW_ALLOW_FILE_STORE": "true"}):
        logger = pl.loggers.MLFlowLogger(save_dir=str(tmp_path / "mlruns"), run_name="old")
        train(logger, tmp_path, 2)
    mlflow.set_tracking_uri(None)
    run = open_run(tmp_path)
    assert isinstance(run.playback, FromMaps)
    assert run.scalars["val/loss"].steps == FIRINGS[1:]
    assert "MLFLOW_ALLOW_FILE_STORE" not in os.environ


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("sqlite:///{}/absent/mlflow.db", "there is no MLflow database at "),
        ("{}/some.db", "some.db is neither a folder nor an MLflow database"),
        ("{}/absent", "there is no folder"),
    ],
)
def test_places_that_hold_no_runs_are_named(address, sentence, home, tmp_path, capsys):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    (tmp_path / "some.db").write_bytes(b"SQLite format 3\0 and no more")
    output = tmp_path / "page.html"
    assert main(["report", address.format(tmp_path), "--output", str(output)]) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("error: ")
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["some.db"]


def test_csv_files_serve_too(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    fit(RolloutCallback(num_images=1, on_error="raise"), logger=logger)
    run = open_run(tmp_path)
    assert run.playback.steps == FIRINGS
    assert run.scalars["val/loss"].steps == FIRINGS[1:]
    assert "step" not in run.scalars


def test_parts_of_a_run_in_folders_below_it_are_no_runs(tmp_path):
    write_maps(write_events(tmp_path / "logs" / "version_2"))
    write_events(tmp_path / "logs" / "version_10")
    write_events(tmp_path / "logs" / "version_10" / "1700000000.123", grids=False)
    found = find_runs([str(tmp_path), str(tmp_path / "logs" / "version_2")])
    assert name_runs(found) == ["version_2", "version_10"]


def test_titles_are_read_in_whatever_order_and_unknown_ones_are_numbered():
    known = ["gradient rollout", "input", "evidence", "attention rollout"]
    assert read_titles(grid(0), known) == ["input", *TITLES]
    assert read_titles(grid(0), ["input", "attention rollout"]) == ["input", TITLES[0], "column 2"]
