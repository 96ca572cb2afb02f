"""`RolloutCallback` in whole runs of Lightning: when it fires, and what it logs and keeps."""

import warnings
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader

import vitx
from tests import run_folders
from tests.lightning_models import IMAGE, SmallClassifier, fit, samples
from tests.played_runs import open_run
from tests.run_folders import events, firing, kept
from vitx.callbacks import RolloutCallback


def test_tensorboard_holds_a_grid_and_scalars_for_each_firing(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(RolloutCallback(num_images=(2, 6), on_error="raise"), logger=logger)
    found = events(logger.log_dir)

    assert [event.step for event in found.Images("vitx/maps")] == [0, 3, 7]
    assert [event.step for event in found.Images("vitx/overview")] == [7]
    for method in ("rollout", "grad_rollout"):
        for name in ("entropy", "information", "pointing", "energy"):
            values = found.Scalars(f"vitx/{method}/{name}")
            assert [event.step for event in values] == [0, 3, 7]
            assert all(0 <= event.value <= 1 for event in values)
        drifts = found.Scalars(f"vitx/{method}/drift")
        assert [event.step for event in drifts] == [3, 7], "the first firing has nothing to compare with"
    logged = [event.step for event in found.Scalars("val/loss")]
    assert logged == [3, 7], "self.log and the callback disagree on the step"


def test_the_scalars_are_those_of_the_core(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    _, module = fit(RolloutCallback(num_images=4, on_error="raise"), logger=logger)
    data = samples(8, seed=1)
    images, masks = (torch.stack([data[i][part] for i in (1, 3, 5, 7)]) for part in (0, 2))
    maps = vitx.explain(module, images, "grad_rollout").maps
    heat = torch.nn.functional.interpolate(maps[:, None], (IMAGE, IMAGE), mode="bilinear")[:, 0]
    energy = ((heat * masks).sum((1, 2)) / heat.sum((1, 2))).mean().item()
    logged = events(logger.log_dir).Scalars("vitx/grad_rollout/energy")[-1].value
    assert logged == pytest.approx(energy, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"at_start": False}, [3, 7]),
        ({"every_n_epochs": None}, [0, 7]),
        ({"every_n_epochs": 2}, [0, 7]),
        ({"every_n_epochs": None, "every_n_steps": 3}, [0, 2, 5, 7]),
        ({"every_n_steps": 4}, [0, 3, 7]),
    ],
)
def test_fires_once_per_step_and_when_told(options, steps, tmp_path):
    fit(RolloutCallback(num_images=1, on_error="raise", **options), default_root_dir=tmp_path)
    assert run_folders.steps(tmp_path) == steps


def test_never_fires_in_the_sanity_check_nor_in_validate(tmp_path, monkeypatch):
    fired = []
    monkeypatch.setattr(RolloutCallback, "_fire_at", lambda *args: fired.append(args[1].trainer.state.stage))
    trainer, module = fit(RolloutCallback(), default_root_dir=tmp_path, num_sanity_val_steps=2)
    count = len(fired)
    trainer.validate(module, DataLoader(samples(4)), verbose=False)
    assert count == 3
    assert len(fired) == count


def test_keeps_what_a_report_needs_and_the_last_picture_where_no_logger_shows_them(tmp_path):
    fit(RolloutCallback(num_images=3, on_error="raise"), default_root_dir=tmp_path)
    written = sorted(path.name for path in kept(tmp_path).iterdir())
    firings = [f"firing-{step:06d}.npz" for step in (0, 3, 7)]
    pictures = ["maps.png", "numbers.csv", "overview.png"]
    assert written == [".lock", *firings, "images-000000.npz", *pictures, "run.json"]
    assert Image.open(kept(tmp_path) / "maps.png").width < 400
    with Image.open(kept(tmp_path) / "overview.png") as overview:
        assert (overview.height, overview.width, 3) == open_run(tmp_path).overview().shape
    shapes = {name: (value.shape, value.dtype) for name, value in firing(tmp_path, 7).items()}
    maps = (3, 4, 4), np.float16
    assert shapes == {
        "rollout": maps,
        "grad_rollout": maps,
        "logits": ((3, 3), np.float32),
        "sinks": (maps[0], np.bool_),
    }
    numbers = open_run(tmp_path).numbers
    assert list(numbers["val/loss"]) == [3, 7]
    assert numbers["epoch"] == {0: 0, 3: 0, 7: 1}
    assert list(numbers["vitx/rollout/drift"]) == [3, 7]


def test_pictures_of_all_firings_are_files_where_no_maps_are_kept(tmp_path):
    fit(RolloutCallback(num_images=3, save_maps=False, on_error="raise"), default_root_dir=tmp_path)
    written = sorted(path.name for path in kept(tmp_path).iterdir())
    pictures = [*(f"maps-{step:06d}.png" for step in (0, 3, 7)), "overview-000007.png"]
    assert written == [".lock", *pictures, "run.json"]


def test_all_measured_images_are_kept_if_asked_for(tmp_path):
    callback = RolloutCallback(num_images=(2, 6), save_maps="all", on_error="raise")
    fit(callback, default_root_dir=tmp_path)
    found = firing(tmp_path, 7)
    assert len(found["rollout"]) == len(found["logits"]) == 6
    with np.load(kept(tmp_path) / "images-000000.npz") as images:
        assert len(images["pixels"]) == 2
        assert len(images["labels"]) == 6
        shown = images["shown"]
    assert np.array_equal(open_run(tmp_path).maps["rollout"][-1], found["rollout"][shown])


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"limit_val_batches": 0}, {"val_check_interval": 2}]
)
def test_works_in_other_settings_of_the_trainer(options, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RolloutCallback")
        given = torch.randn(2, 3, IMAGE, IMAGE)
        fit(RolloutCallback(images=given), default_root_dir=tmp_path, **options)
    assert list(tmp_path.rglob("maps.png")) or options == {"fast_dev_run": True}


def test_a_dry_run_leaves_nothing(tmp_path):
    fit(RolloutCallback(on_error="raise"), default_root_dir=tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("*.*"))


def test_each_run_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "notes.txt").write_text("mine")
    for epochs in (2, 1):
        fit(RolloutCallback(on_error="raise"), default_root_dir=tmp_path, max_epochs=epochs)
    assert run_folders.steps(tmp_path / "version_1") == [0, 3, 7]
    assert run_folders.steps(tmp_path / "version_2") == [0, 3]
    assert [path.name for path in (tmp_path / "version_0").iterdir()] == ["notes.txt"]


def test_a_logger_that_names_two_runs_alike(tmp_path, caplog):
    with caplog.at_level("INFO"):
        for epochs in (2, 1):
            logger = CSVLogger(tmp_path, "first", "again")
            fit(RolloutCallback(on_error="raise"), logger=logger, max_epochs=epochs)
    assert run_folders.steps(tmp_path / "first" / "again") == [0, 3, 7]
    assert run_folders.steps(tmp_path / "first" / "again-1") == [0, 3]
    assert caplog.text.count("holds another run") == 1


def test_what_the_run_is(tmp_path):
    class Told(SmallClassifier):
        def __init__(self, lr=0.1, api_key="sesame"):
            super().__init__()
            self.save_hyperparameters()

    callback = RolloutCallback(methods={"rollout": {"head_fusion": "max"}}, target=2, on_error="raise")
    trainer, _ = fit(callback, module=Told, logger=CSVLogger(tmp_path, "first"))
    facts = open_run(tmp_path).facts
    assert kept(tmp_path).parent == Path(trainer.logger.log_dir)
    assert facts["settings"] == {"lr": 0.1, "api_key": "***"}
    assert facts["methods"] == {"rollout": {"head_fusion": "max"}}
    assert facts["loggers"] == [{"name": "CSVLogger", "version": "0", "title": None, "address": "."}]
    assert (facts["target"], facts["kind"], facts["ended"]) == (2, "class", True)


def test_says_at_first_what_was_found(caplog):
    with caplog.at_level("INFO"):
        fit(RolloutCallback(num_images=2))
    (said,) = {record.message for record in caplog.records if "watches" in record.message}
    assert (
        "watches 2 of 8 images of TensorDataset; images: item 0 of a batch; labels: item 1; masks: it" in said
    )
    assert "; methods: attention rollout, gradient rollout; class names: none; colors: guessed; " in said


@pytest.mark.parametrize("name", ["validate", "test"])
def test_shows_what_is_validated_or_tested_if_asked(name, tmp_path):
    class Tested(SmallClassifier):
        test_step = SmallClassifier.validation_step

    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    for on_validate in (False, True):
        trainer = pl.Trainer(
            callbacks=[RolloutCallback(on_validate=on_validate, on_error="raise")],
            enable_progress_bar=False,
            **options,
        )
        getattr(trainer, name)(Tested(), DataLoader(samples(8), 4), verbose=False)
        assert len(list(tmp_path.rglob("firing-*"))) == int(on_validate)


def test_belongs_to_both_packages_of_lightning():
    twin = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    assert isinstance(RolloutCallback(), twin.Callback)
    assert isinstance(RolloutCallback(), pl.Callback)


def test_one_callback_serves_two_runs(tmp_path):
    callback = RolloutCallback(num_images=1, on_error="raise")
    for run in ("first", "second"):
        fit(callback, default_root_dir=tmp_path / run)
        assert run_folders.steps(tmp_path / run) == [0, 3, 7]


def test_a_frozen_block_stays_in_eval(tmp_path):
    modes = defaultdict(set)

    class Frozen(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.norm.eval()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            modes["norm"].add(pl_module.norm.training)
            modes["vit"].add(pl_module.vit.training)

    fit(RolloutCallback(every_n_steps=1, num_images=1, on_error="raise"), Frozen(), default_root_dir=tmp_path)
    assert modes == {"norm": {False}, "vit": {True}}


class TwoOptimizers(SmallClassifier):
    """A module that counts two steps per batch in `global_step`, and one on the axis of `self.log`."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.vit, self.head)]


@pytest.mark.parametrize(
    ("module", "settings"),
    [(SmallClassifier, {}), (SmallClassifier, {"accumulate_grad_batches": 3}), (TwoOptimizers, {})],
    ids=["plain", "accumulating", "two optimizers"],
)
def test_the_steps_are_those_of_self_log(module, settings, tmp_path):
    class Own(pl.Callback):
        """A callback that logs whenever the RolloutCallback does."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("own", 1.0)

    logger = TensorBoardLogger(tmp_path, name="run")
    fit(Own(), RolloutCallback(every_n_steps=1, on_error="raise"), module=module, logger=logger, **settings)
    found = events(logger.log_dir)
    steps = [event.step for event in found.Scalars("vitx/rollout/entropy")]
    logged = sorted({event.step for event in found.Scalars("own")})
    assert steps == logged
    assert [event.step for event in found.Images("vitx/maps")] == steps
