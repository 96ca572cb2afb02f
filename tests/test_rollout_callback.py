import sys
import warnings
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

import vitx
from tests.lightning_models import IMAGE, SmallClassifier, fit, samples
from vitx.callbacks import RolloutCallback


def events(folder: str | Path) -> EventAccumulator:
    reader = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return reader.Reload()


def test_tensorboard_holds_a_grid_and_scalars_for_each_firing(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    fit(RolloutCallback(num_images=2, num_measured=6, on_error="raise"), logger=logger)
    found = events(logger.log_dir)

    assert [event.step for event in found.Images("vitx/maps")] == [0, 3, 7]
    for method in ("rollout", "grad_rollout"):
        for name in ("entropy", "border", "pointing", "energy"):
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
    found = sorted(int(path.stem.split("-")[-1]) for path in (tmp_path / "vitx").glob("*.png"))
    assert found == steps


def test_never_fires_in_the_sanity_check_nor_in_validate(tmp_path, monkeypatch):
    fired = []
    monkeypatch.setattr(RolloutCallback, "_show", lambda *args: fired.append(args[1].state.stage))
    trainer, module = fit(RolloutCallback(), default_root_dir=tmp_path, num_sanity_val_steps=2)
    count = len(fired)
    trainer.validate(module, DataLoader(samples(4)), verbose=False)
    assert count == 3
    assert len(fired) == count


def test_writes_png_files_and_maps_where_no_logger_shows_pictures(tmp_path):
    fit(RolloutCallback(num_images=3, save_maps=True, on_error="raise"), default_root_dir=tmp_path)
    written = sorted(path.name for path in (tmp_path / "vitx").iterdir())
    assert written == [
        *(f"maps-{step:06d}.npz" for step in (0, 3, 7)),
        *(f"vitx-maps-{step:06d}.png" for step in (0, 3, 7)),
    ]
    picture = Image.open(tmp_path / "vitx" / "vitx-maps-000007.png")
    assert picture.width < 400
    maps = np.load(tmp_path / "vitx" / "maps-000007.npz")
    assert {name: value.shape for name, value in maps.items()} == {
        "rollout": (3, 4, 4),
        "grad_rollout": (3, 4, 4),
    }


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"limit_val_batches": 0}, {"val_check_interval": 2}]
)
def test_works_in_other_settings_of_the_trainer(options, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="RolloutCallback")
        given = torch.randn(2, 3, IMAGE, IMAGE)
        fit(RolloutCallback(images=given), default_root_dir=tmp_path, **options)
    assert list((tmp_path / "vitx").glob("*.png"))


def test_a_failing_explanation_warns_and_training_goes_on(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no picture today")

    monkeypatch.setattr(sys.modules["vitx.callbacks.rollout"], "explain_methods", fail)
    with pytest.warns(UserWarning, match="no picture today"):
        trainer, watched = fit(RolloutCallback(), default_root_dir=tmp_path)
    assert trainer.global_step == 8
    _, plain = fit(default_root_dir=tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), f"{name} differs"
    with pytest.raises(RuntimeError, match="no picture today"):
        fit(RolloutCallback(on_error="raise"), default_root_dir=tmp_path)


def resume(callback: RolloutCallback, validation: DataLoader, folder: Path) -> None:
    """Trains one epoch more from last.ckpt in the folder; pictures go to its subfolder `resumed`."""
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        default_root_dir=folder / "resumed",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    train = DataLoader(samples(16), batch_size=4)
    trainer.fit(SmallClassifier(), train, validation, ckpt_path=folder / "last.ckpt")


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    callback = RolloutCallback(num_images=2, on_error="raise")
    trainer, _ = fit(callback, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again = RolloutCallback(num_images=2, on_error="raise")
    resume(again, DataLoader(samples(8, seed=1)), tmp_path)
    found = sorted(path.name for path in (tmp_path / "resumed" / "vitx").glob("*.png"))
    assert found == ["vitx-maps-000011.png"], "what was shown before the stop is not shown again"


def test_one_callback_serves_two_runs(tmp_path):
    callback = RolloutCallback(num_images=1, on_error="raise")
    for run in ("first", "second"):
        fit(callback, default_root_dir=tmp_path / run)
        assert len(list((tmp_path / run / "vitx").glob("*.png"))) == 3


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
        ({"num_images": 0}, "num_images must be at least 1, found 0"),
        ({"methods": ["saliency"]}, "there is no method 'saliency'"),
        ({"methods": {"rollout": {"fusion": "max"}}}, "no option 'fusion'"),
        ({"methods": []}, "methods is empty"),
        ({"target": "best"}, "target must be"),
        ({"weights": "best"}, "weights must be"),
        ({"on_error": "ignore"}, "on_error must be"),
    ],
)
def test_refuses_wrong_arguments_at_once(options, sentence):
    with pytest.raises(vitx.VitxError, match=sentence):
        RolloutCallback(**options)
