import shutil
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import vitx
from tests import run_folders
from tests.lightning_models import IMAGE, SmallClassifier, fit, samples
from tests.played_runs import open_run
from tests.run_folders import events, firing, kept
from vitx.attribution import title_of
from vitx.callbacks import RolloutCallback
from vitx.pictures import render
from vitx.pictures.captions import captions_of

GRID = np.zeros((4, 4, 3), np.uint8)
GIVEN = torch.zeros(2, 3, IMAGE, IMAGE)


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


def test_the_images_are_kept_also_where_the_first_firing_fails(tmp_path, failing):
    failing.times = 2  # with the others, and when tried alone
    callback = RolloutCallback(methods=["rollout", "failing"], num_images=2)
    with pytest.warns(UserWarning, match="no map today"):
        fit(callback, default_root_dir=tmp_path)
    assert np.load(kept(tmp_path) / "images-000000.npz")["pixels"].shape == (2, IMAGE, IMAGE, 3)
    assert list(firing(tmp_path, 0)) == ["rollout", "logits", "sinks"]
    assert list(firing(tmp_path, 7)) == ["rollout", "failing", "logits", "sinks"]


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
    with pytest.warns(
        UserWarning, match="shows nothing at step 0: the target function failed on .* no score today"
    ):
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


def resume(callback: RolloutCallback, validation: DataLoader, folder: Path, *others: pl.Callback) -> None:
    """Train one more epoch from last.ckpt in the folder; the new root is its subfolder `resumed`."""
    data, root = (DataLoader(samples(16), batch_size=4), validation), folder / "resumed"
    fit(callback, *others, data=data, ckpt_path=folder / "last.ckpt", max_epochs=3, default_root_dir=root)


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    callback = RolloutCallback(num_images=2, on_error="raise")
    trainer, _ = fit(callback, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again = RolloutCallback(num_images=2, on_error="raise")
    resume(again, DataLoader(samples(8, seed=1)), tmp_path)
    found = run_folders.steps(tmp_path)
    assert found == [0, 3, 7, 11], "in the same folder; what was shown before the stop is not shown again"
    assert list(open_run(tmp_path).numbers["vitx/rollout/entropy"]) == found


def test_a_resumed_run_whose_folder_is_gone(tmp_path, caplog):
    trainer, _ = fit(RolloutCallback(num_images=2, on_error="raise"), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    shutil.rmtree(tmp_path / "version_0")
    with caplog.at_level("INFO"):
        resume(RolloutCallback(num_images=2, on_error="raise"), DataLoader(samples(8, seed=1)), tmp_path)
    assert run_folders.steps(tmp_path / "resumed") == [11]
    assert "version_0/vitx is gone" in caplog.text


def test_a_checkpoint_from_which_two_go_on(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last", save_top_k=-1, every_n_train_steps=4)
    callback = RolloutCallback(num_images=2, on_error="raise")
    fit(callback, keep, default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=True)
    for _ in range(2):
        resume(RolloutCallback(num_images=2, on_error="raise"), DataLoader(samples(8, seed=1)), tmp_path)
    assert run_folders.steps(tmp_path / "version_0") == [0, 3, 7, 11]
    assert run_folders.steps(tmp_path / "version_1") == [0, 3, 7, 11], "what the first one found stays"


def test_a_checkpoint_of_another_version_does_not_stop_a_resume(tmp_path):
    trainer, _ = fit(RolloutCallback(num_images=2, on_error="raise"), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt")
    state = checkpoint["callbacks"]["RolloutCallback"]
    del state["scalars"]
    state["indices"] = (1, 2)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    resume(RolloutCallback(num_images=2, on_error="raise"), DataLoader(samples(8, seed=1)), tmp_path)
    assert run_folders.steps(tmp_path) == [0, 3, 7, 11]


@pytest.mark.parametrize("state", [{}, {"foo": 1}, None])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(
        vitx.VitxError, match="RolloutCallback needs what its state_dict\\(\\) returned, found"
    ):
        RolloutCallback().load_state_dict(state)


def test_one_callback_serves_two_runs(tmp_path):
    callback = RolloutCallback(num_images=1, on_error="raise")
    for run in ("first", "second"):
        fit(callback, default_root_dir=tmp_path / run)
        assert run_folders.steps(tmp_path / run) == [0, 3, 7]


def test_says_when_the_data_set_has_changed(tmp_path):
    trainer, _ = fit(RolloutCallback(num_images=2, on_error="raise"), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    longer = DataLoader(samples(12, seed=1))
    with pytest.warns(UserWarning, match="the data set has changed"):
        resume(RolloutCallback(num_images=2, on_error="raise"), longer, tmp_path)


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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_images": 0}, "num_images must be a whole number from 1, or two of them, found 0"),
        ({"num_images": (8, 0)}, "num_images must be"),
        ({"num_images": (1, 2, 3)}, "num_images must be"),
        ({"num_images": 8.0}, "num_images must be"),
        ({"methods": ["saliency"]}, "there is no method 'saliency'"),
        ({"methods": {"rollout": {"fusion": "max"}}}, "no option 'fusion'"),
        ({"methods": []}, "methods must be names, or a mapping"),
        ({"target": "best"}, "target must be"),
        ({"weights": "best"}, "weights must be"),
        ({"on_error": "ignore"}, "on_error must be 'warn' or 'raise', found 'ignore'"),
        ({"target": 3.5}, "target must be"),
        ({"methods": "legrad", "target": vitx.targets.token(1, 1)}, "legrad explains only classes"),
        ({"every_n_steps": -3}, "every_n_steps must be a whole number, or None, found -3"),
        ({"class_names": "cat"}, "class_names must be a list of names, or a mapping .*, found 'cat'"),
        ({"bands": 7}, "bands must be one or three channels, in a list, found 7"),
        ({"colormap": 3}, "there is no color map 3"),
        ({"normalization": 0.5}, r"normalization must be \(mean, std\), numbers for the channels, found 0.5"),
        ({"normalization": [0.5]}, "normalization must be"),
        ({"faithfulness": "yes"}, "faithfulness must be True, False or a number of images, found 'yes'"),
        ({"at_start": "no"}, "at_start must be True or False, found 'no'"),
        ({"batch_transform": 3}, "batch_transform must be a function, found 3"),
        ({"dataloader_idx": None}, "dataloader_idx must be the number or the name of a loader, found None"),
        ({"labels": 2.5}, "labels must be an item of a batch, by key or position, found 2.5"),
        ({"boxes": [1]}, "boxes must be a tensor, or an item of a batch"),
        ({"images": GIVEN, "labels": 7}, "labels has no effect on the images given: leave it out, or give a"),
        ({"images": GIVEN, "show": "zz"}, "show has no effect"),
        ({"images": ["cat.jpg"], "boxes": "b"}, "boxes has no effect"),
        ({"images": GIVEN, "per_class": True}, "per_class has no effect"),
        ({"images": [3, 4], "per_class": True}, "per_class has no effect"),
        ({"num_image": 3}, r"RolloutCallback has no option 'num_image': did you mean num_images\?"),
        ({"zzz": 3}, "RolloutCallback has no option 'zzz': vitx.watch.Settings lists them"),
    ],
)
def test_refuses_wrong_arguments_at_once(options, sentence):
    with pytest.raises(vitx.VitxError, match=sentence):
        RolloutCallback(**options)


def test_numbers_of_images_may_come_from_numpy():
    both = RolloutCallback(num_images=np.int64(3)), RolloutCallback(num_images=np.array([3, 5]))
    assert [(one.num_images, one.num_measured) for one in both] == [(3, 3), (3, 5)]


def test_one_number_normalizes_all_channels():
    assert RolloutCallback(normalization=(0.5, 0.25)).normalization == ((0.5,), (0.25,))


def test_checkpoints_and_early_stopping_can_monitor_the_numbers(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="vitx/grad_rollout/pointing", mode="max", filename="best")
    often = ModelCheckpoint(
        tmp_path,
        monitor="vitx/rollout/entropy",
        mode="min",
        every_n_train_steps=3,
        filename="often-{step}",
        save_top_k=-1,
    )
    stop = EarlyStopping("vitx/rollout/information", mode="max", patience=1, min_delta=1)
    callback = RolloutCallback(on_error="raise", every_n_steps=3)
    trainer, _ = fit(
        best, often, stop, callback, default_root_dir=tmp_path, enable_checkpointing=True, max_epochs=9
    )
    assert trainer.current_epoch == 2, "the early stopping did not see that the number stays the same"
    assert (tmp_path / "best.ckpt").exists()
    assert sorted(path.name for path in tmp_path.glob("often*")) == ["often-step=3.ckpt", "often-step=6.ckpt"]
    assert 0 <= best.best_model_score <= 1


def test_a_resumed_run_can_monitor_numbers_of_before(tmp_path):
    """This holds even if the callback does not fire again before the epoch ends."""
    trainer, _ = fit(RolloutCallback(on_error="raise"), default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = {name: value.item() for name, value in trainer.callback_metrics.items() if "vitx/" in name}

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.found = {name: trainer.callback_metrics[name].item() for name in before}

    look = Look()
    resume(
        RolloutCallback(on_error="raise", every_n_epochs=100), DataLoader(samples(8, seed=1)), tmp_path, look
    )
    assert look.found == before


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


class ManyLabels(SmallClassifier):
    def training_step(self, batch, _):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, *_):
        pass


class Regression(ManyLabels):
    def forward(self, images):
        return super().forward(images)[:, 0]

    def training_step(self, batch, _):
        return F.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("module", "labels", "target"),
    [
        (ManyLabels, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]), lambda x: x[:, 2]),
        (ManyLabels, torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]), "predicted"),
        (Regression, torch.tensor([0.5, 1.5, -0.5, 2.0]), lambda x: x),
    ],
    ids=["a class of several", "the likeliest of several", "a number"],
)
def test_several_classes_and_numbers(module, labels, target, monkeypatch):
    seen = []
    monkeypatch.setattr(render, "grid", lambda columns, captions, **_: seen.append(captions) or GRID)
    data = DataLoader(TensorDataset(samples(4).tensors[0], labels), batch_size=4)
    fit(RolloutCallback(target=target, on_error="raise"), module=module, data=(data, data), max_epochs=1)
    assert [caption.label for caption in seen[0]] == (
        ["0.50", "1.50", "-0.50", "2.00"] if module is Regression else ["0 + 1", "none", "1 + 2", "0"]
    )


class Shares(Regression):
    """A regression of shares with binary cross entropy."""

    def training_step(self, batch, _):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    validation_step = training_step


def test_shares_are_captioned_as_shares(monkeypatch):
    said = []
    monkeypatch.setattr(render, "grid", lambda columns, captions, **_: said.append(captions) or GRID)
    images, module = samples(4).tensors[0], Shares()
    data = DataLoader(TensorDataset(images, torch.tensor([0.35, 0.5, 1.0, 0.05])), batch_size=4)
    shares = module.eval()(images).sigmoid().tolist()
    fit(RolloutCallback(on_error="raise"), module=module.train(), data=(data, data), max_epochs=1)
    truth = ["0.35", "0.50", "1.00", "0.05"]
    expected = [f"{share:.2f}, is {true}" for share, true in zip(shares, truth, strict=True)]
    assert [str(caption) for caption in said[0]] == expected


def test_an_error_before_the_training_stays_its_own(tmp_path):
    class Broken(pl.LightningDataModule):
        def setup(self, stage):
            raise FileNotFoundError("no such folder")

    trainer = pl.Trainer(accelerator="cpu", callbacks=[RolloutCallback()], default_root_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        trainer.fit(SmallClassifier(), datamodule=Broken())


class Features(ManyLabels):
    """A backbone alone, whose training tells the callback nothing about its output."""

    def __init__(self):
        super().__init__()
        self.head, self.norm = nn.Identity(), nn.Identity()

    def training_step(self, batch, _):
        images = batch[0] if isinstance(batch, list) else batch
        return self(images).square().mean()


class Embeddings(Features):
    """Features that the validation step compares with nothing."""

    def validation_step(self, batch, _):
        return self(batch[0])


class Tokens(Features):
    def forward(self, images):
        return self.vit.forward_features(images)


class TwoNumbers(Features):
    def forward(self, images):
        return super().forward(images)[:, :2]


NAMED = samples(4)
NAMED.classes = ["cat", "dog", "owl"]
WITHOUT = samples(4).tensors[0]
UNLISTED = ConcatDataset([samples(4)])  # lists no labels
FEATURES = {
    "labels of few classes": (Features, samples(4), {}, ["rollout", "attention"]),
    "names of few classes": (Features, NAMED, {}, ["rollout", "attention"]),
    "labels that nothing is compared with": (Embeddings, UNLISTED, {}, ["rollout", "attention"]),
    "names make scores of them": (
        Embeddings,
        UNLISTED,
        {"class_names": list("abcdefghijklmnopqrstuvwx")},
        ["rollout", "grad_rollout"],
    ),
    "no labels": (Features, WITHOUT, {}, ["rollout", "attention"]),
    "tokens": (Tokens, samples(4), {}, ["rollout", "attention"]),
    "coordinates": (TwoNumbers, TensorDataset(WITHOUT, torch.randn(4, 2)), {}, ["rollout", "attention"]),
    "one method": (Features, samples(4), {"methods": ["flow"]}, ["flow"]),
    "a score of features": (
        Features,
        samples(4),
        {"target": lambda x: x.norm(dim=1)},
        ["rollout", "grad_rollout"],
    ),
    "a score of tokens": (Tokens, samples(4), {"target": lambda x: x[:, 0, 0]}, ["rollout", "grad_rollout"]),
    "classes": (SmallClassifier, samples(4), {}, ["rollout", "grad_rollout"]),
}


@pytest.mark.parametrize(("module", "data", "options", "methods"), FEATURES.values(), ids=FEATURES)
def test_features_are_no_classes(module, data, options, methods, tmp_path, monkeypatch, caplog):
    seen = []
    grid = render.grid
    monkeypatch.setattr(render, "grid", lambda *args, **kwargs: seen.append(args) or grid(*args, **kwargs))
    callback = RolloutCallback(on_error="raise", **options)
    loaders = DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)
    with caplog.at_level("INFO"):
        fit(callback, module=module, data=loaders, max_steps=1, default_root_dir=tmp_path)
    columns, captions = seen[0]
    assert list(columns)[1:] == [title_of(name) for name in methods]
    assert list(callback.state_dict()["maps"]) == methods
    says = module in (SmallClassifier, TwoNumbers) or "class_names" in options
    assert all(bool(str(caption)) == says for caption in captions)
    said = "numbers for each image" if module is Tokens else "outputs features"
    assert (said in caplog.text) == (methods[-1] != "grad_rollout")
    run = open_run(tmp_path)
    logits = torch.from_numpy(run.logits[0])
    played = captions_of(logits, torch.zeros(4).long(), kind=run.facts["kind"])
    assert all(bool(str(caption)) == says for caption in played), "the report would say classes"


def test_a_method_that_fails_is_tried_with_the_others_and_alone(tmp_path, failing):
    callback = RolloutCallback(methods=["rollout", "failing"], every_n_steps=1)
    with pytest.warns(UserWarning, match="no map today"):
        trainer, _ = fit(callback, default_root_dir=tmp_path)
    assert failing.calls == 2 * 8, "not at each of 8 firings"
    assert "vitx/rollout/entropy" in trainer.callback_metrics


def test_the_map_of_a_regression_is_about_the_number():
    data = DataLoader(TensorDataset(samples(4).tensors[0], torch.tensor([0.5, 1.5, -0.5, 2.0])), batch_size=4)
    maps = []
    for target in ("predicted", lambda numbers: numbers):
        callback = RolloutCallback(target=target, on_error="raise")
        fit(callback, module=Regression, data=(data, data), max_steps=1)
        maps.append(callback.state_dict()["maps"]["grad_rollout"])
    assert torch.equal(*maps)


def test_each_error_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["vitx.watch.explaining"], "explain_methods", lambda *_, **__: 1 / 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(RolloutCallback(every_n_steps=1), default_root_dir=tmp_path)
    assert len([w for w in said if "RolloutCallback shows nothing" in str(w.message)]) == 1


def test_a_checkpoint_of_the_validation_sees_the_numbers_of_its_own_epoch(tmp_path):
    keep = ModelCheckpoint(
        tmp_path, monitor="vitx/grad_rollout/energy", save_top_k=-1, save_on_train_epoch_end=False
    )
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(keep, RolloutCallback(on_error="raise"), logger=logger, enable_checkpointing=True)
    _, *logged = events(logger.log_dir).Scalars("vitx/grad_rollout/energy")
    assert [score.item() for score in keep.best_k_models.values()] == [
        pytest.approx(event.value) for event in logged
    ]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("predicted", ""),
        ("label", "maps of the true class"),
        (1, "maps of owl"),
        (7, "maps of 7"),
        (len, "maps of your own score"),
    ],
)
def test_says_what_the_maps_are_about(target, said):
    from vitx.watch.showing import about

    assert about(target, ["cat", "owl"]) == said
    assert about(1, None) == "maps of 1"
    assert about("predicted", None, "numbers") == "maps of the number"
    assert about("predicted", None, "classes") == "maps of the likeliest class"
