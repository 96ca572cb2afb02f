"""Pictures and numbers in TensorBoard's files, also of resumed runs."""

import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.lightning_models import fit
from tests.loggers import FIRINGS, PICTURE, Own, callback, pixels, steps
from tests.run_folders import events
from vitx.watch.loggers import drop_from, show_picture, write_scalars


def make_older(folder):
    """Make event files a second older: they are ordered by the seconds in their names."""
    for path in folder.rglob("events.out.tfevents.*"):
        *before, seconds, rest = path.name.split(".", 4)
        path.rename(path.with_name(".".join([*before, f"{int(seconds) - 1}", rest])))


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
    fit(callback(), keep, logger=TensorBoardLogger(tmp_path, version=0), enable_checkpointing=True)
    make_older(tmp_path)
    again, own = TensorBoardLogger(tmp_path, version=0), Own()
    loggers, stopped = [again, own, CSVLogger(tmp_path)], tmp_path / "epoch=0.ckpt"
    fit(callback(), logger=loggers, ckpt_path=stopped)
    found = events(again.log_dir)
    assert steps(found.Images("vitx/maps")) == steps(found.Scalars("vitx/rollout/entropy")) == FIRINGS
    assert steps(found.Scalars("val/loss")) == FIRINGS[1:]
    assert steps(found.Scalars("train/loss")) == list(range(8))
    assert own.steps("vitx/rollout/entropy") == [7], "the second run is not resumed"
