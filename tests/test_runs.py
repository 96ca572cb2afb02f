"""What a run left behind is read as it was written, and what is wrong with it is said in a sentence."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from tests.lightning_models import IMAGE, fit
from tests.played_runs import (
    CLASSES,
    COUNT,
    LABELS,
    LOGITS,
    SIZE,
    STEPS,
    grid,
    maps,
    pixels,
    same,
    write_events,
    write_maps,
)
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.pictures import render
from vitx.pictures.captions import Caption, captions_of
from vitx.runs.cutting import cut
from vitx.runs.finding import open_run
from vitx.runs.playback import FromGrids, FromMaps
from vitx.runs.ranking import rank
from vitx.runs.saved import load_maps, save_images, save_maps
from vitx.watch.images import Samples
from vitx.watch.showing import keep_images


def test_saved_maps_are_read_as_they_were_written(tmp_path):
    saved = load_maps(write_maps(tmp_path) / "vitx")
    assert saved.steps == STEPS
    for firing, step in enumerate(STEPS):
        for name, expected in maps(step).items():
            assert same(saved.maps[name][firing], expected)
        assert same(saved.logits[firing], LOGITS)
    assert same(saved.pixels, pixels())
    assert same(saved.labels, LABELS)
    assert (list(saved.class_names), saved.colormap) == (CLASSES, "inferno")


def test_a_real_run_is_played_back_from_its_maps_as_it_was_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run")
    names = ["cat", "dog", "newt"]
    callback = RolloutCallback(
        num_images=3, save_maps=True, class_names=names, colormap="viridis", on_error="raise"
    )
    fit(callback, logger=logger)
    run = open_run(tmp_path)
    assert run.path == Path(logger.log_dir)
    assert isinstance(run.playback, FromMaps)
    assert run.playback.steps == (0, 3, 7)
    assert run.scalars["val/loss"].steps == (3, 7)
    assert run.playback.saved.pixels.shape == (3, IMAGE, IMAGE, 3)
    assert run.playback.saved.class_names == tuple(names)
    shutil.rmtree(run.path / "vitx")
    logged = open_run(tmp_path).playback
    assert isinstance(logged, FromGrids)
    for firing in range(3):
        assert same(logged.grid(firing, range(3)), run.playback.grid(firing, range(3)))
        assert list(logged.tiles(firing, 0)) == ["input", "attention rollout", "gradient rollout"]


def test_no_frame_of_a_clip_reaches_into_the_next(tmp_path):
    maps = np.zeros((1, 4, 2, 2), np.float32)
    maps[0, 0, :, 1] = 1  # the right of the first frame
    save_maps(tmp_path / "vitx", {"rollout": maps}, 1, np.zeros((1, 3), np.float32))
    save_images(tmp_path / "vitx", np.zeros((1, 4, 8, 8, 3), np.uint8))
    tile = FromMaps(load_maps(tmp_path / "vitx")).tiles(0, 0)["attention rollout"].astype(int).sum(-1)
    assert tile.shape == (8, 4 * 8)
    assert tile[:, 7].min() > 5 * tile[:, 0].max()
    assert tile[:, 8:].max() == tile[:, 0].min()


def test_labels_of_all_kinds_can_be_kept(tmp_path):
    for labels in (None, torch.tensor([[1, 0], [0, 1]]), torch.tensor([0.5, 2], dtype=torch.bfloat16)):
        samples = Samples(torch.zeros(2, 3, 8, 8), labels, shown=(1,))
        shown = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        keep_images(tmp_path, samples, shown, None, "inferno")
        save_maps(tmp_path, {"rollout": np.ones((1, 2, 2), np.float32)}, 0, np.zeros((1, 2), np.float32))
        saved = load_maps(tmp_path)
        assert saved.class_names is None
        if labels is None:
            assert saved.labels is None
        else:
            assert np.array_equal(saved.labels, labels[1:].float())


@pytest.mark.parametrize("height", [SIZE, SIZE // 2, SIZE * 2, 7])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("lines", "note"), [(1, ""), (3, ""), (1, "colours guessed; " * 5)])
def test_a_grid_is_cut_into_what_it_was_made_of(count, height, lines, note):
    white = torch.full((count, height, SIZE, 3), 255, dtype=torch.uint8)  # must not pass for what is between
    heat = torch.linspace(0, 1, SIZE).expand(count, height, SIZE)
    columns = {"input": white, "map": render.overlays(white, heat)}
    long = Caption(" + ".join(["great crested newt"] * lines), 0.5)
    captions = [Caption("newt", 0.5), Caption("newt", 0.5), long][-count:]
    rows = cut(render.grid(columns, captions, note=note))
    assert len(rows) == count
    for row in rows:
        given, overlay = (render._tile(columns[title][0].numpy(), render.TILE_WIDTH) for title in columns)
        assert same(row.tiles[0], np.asarray(given))
        assert same(row.tiles[1], np.asarray(overlay))
        assert row.caption.shape[0] == lines * render.LINE
        assert row.caption.min() < 100, "there is text"


@pytest.mark.parametrize("shape", [(300, 300, 3), (20, 350, 3), (400, 350, 3)])
def test_what_is_no_grid_is_refused(shape):
    with pytest.raises(VitxError, match=f"{shape[1]} x {shape[0]} pixels is no grid"):
        cut(np.zeros(shape, np.uint8))


def test_logged_grids_are_taken_apart_and_joined_anew(tmp_path):
    run = open_run(write_events(tmp_path))
    assert isinstance(run.playback, FromGrids)
    assert (run.playback.steps, run.playback.count) == (STEPS, COUNT)
    assert same(run.playback.grid(1, range(COUNT)), grid(STEPS[1]))
    two = run.playback.grid(1, [0, 1])
    rows = cut(two)
    assert [
        same(row.tiles[1], run.playback.tiles(1, image)["attention rollout"])
        for image, row in enumerate(rows)
    ] == [True] * 2


def test_grids_in_png_files_serve_too(tmp_path):
    (tmp_path / "vitx").mkdir()
    for step in STEPS:
        Image.fromarray(grid(step)).save(tmp_path / "vitx" / f"vitx-maps-{step:06d}.png")
    run = open_run(tmp_path)
    assert run.playback.steps == STEPS
    assert same(run.playback.grid(2, range(COUNT)), grid(STEPS[2]))
    assert run.heading(2) == f"step {STEPS[2]}", "nothing is known of its accuracy"


def test_a_resumed_run_has_each_step_once_and_the_last_holds(tmp_path):
    write_events(tmp_path, accuracy=0.25)
    time.sleep(1)  # the seconds in their names are the order of the files
    write_events(tmp_path, steps=(4, 9, 12), purge=4, accuracy=0.75)
    run = open_run(tmp_path)
    assert run.playback.steps == (0, 4, 9, 12)
    assert run.scalars["val/accuracy"].values == (0.75, 0.75, 0.75)
    assert [run.heading(firing) for firing in (0, 1)] == ["step 0", "step 4, accuracy 75%"]


def test_accuracy_in_percent_is_not_scaled_again(tmp_path):
    assert open_run(write_events(tmp_path, accuracy=91.4)).heading(1) == "step 4, accuracy 91%"


def test_wrong_and_sure_comes_first_and_then_what_moved(tmp_path):
    saved = load_maps(write_maps(tmp_path) / "vitx")
    said = captions_of(torch.from_numpy(LOGITS), torch.from_numpy(LABELS), CLASSES)
    first, second, third = rank(saved, said)
    assert [first.image, second.image, third.image] == [2, 1, 0]
    assert first.reason.startswith("wrong at the end, and 99% sure; its ")
    assert "moved most from step" in second.reason
    assert third.reason == "its maps stand still"


def deleted(name):
    return lambda run: (run / "vitx" / name).unlink()


def emptied(name):
    return lambda run: (run / "vitx" / name).write_bytes(b"")


def torn(name):
    def tear(run):
        path = run / "vitx" / name
        path.write_bytes(path.read_bytes()[:-30])

    return tear


def of_others(run):
    save_maps(run / "vitx", maps(12, 2), 12, LOGITS[:2])


def of_another_method(run):
    save_maps(run / "vitx", {"saliency": maps(12)["rollout"]}, 12, LOGITS)


def pickled(run):
    np.save(run / "vitx" / "logits-000004.npy", np.array([{}]), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (emptied("maps-000004.npz"), "cannot read .*maps-000004.npz"),
        (torn("maps-000004.npz"), "cannot read .*maps-000004.npz"),
        (torn("images.npz"), "cannot read .*images.npz"),
        (torn("logits-000009.npy"), "cannot read .*logits-000009.npy"),
        (deleted("logits-000009.npy"), "cannot read .*logits-000009.npy"),
        (pickled, "cannot read .*logits-000004.npy"),
        (of_others, "at step 0, .* of 3 images"),
        (of_another_method, "have no method in common"),
        (deleted("images.npz"), "holds no pictures to play back"),
    ],
)
def test_what_is_wrong_with_saved_maps_is_said(spoil, sentence, tmp_path):
    spoil(write_maps(tmp_path))
    with pytest.raises(VitxError, match=sentence):
        open_run(tmp_path)


def test_a_method_that_came_later_is_left_out(tmp_path):
    write_maps(tmp_path)
    save_maps(tmp_path / "vitx", {**maps(12), "late": maps(12)["rollout"]}, 12, LOGITS)
    assert set(open_run(tmp_path).playback.saved.maps) == {"rollout", "grad_rollout"}


def test_folders_without_a_run_or_with_several_are_refused(tmp_path):
    with pytest.raises(VitxError, match=r"there is no folder .*absent"):
        open_run(tmp_path / "absent")
    with pytest.raises(VitxError, match="neither event files nor saved maps"):
        open_run(tmp_path)
    one = write_maps(tmp_path / "logs" / "one")
    assert open_run(tmp_path).path == one
    write_events(tmp_path / "logs" / "two", grids=False)
    with pytest.raises(VitxError, match=r"holds 2 runs: give one of .*one, .*two"):
        open_run(tmp_path)
    with pytest.raises(VitxError, match="two holds no pictures to play back: RolloutCallback was not there"):
        open_run(tmp_path / "logs" / "two")


def test_damaged_pictures_and_event_files_are_said_or_left_out(tmp_path):
    write_maps(tmp_path / "run")
    (tmp_path / "run" / "events.out.tfevents.1.here").write_bytes(b"no record at all")
    assert open_run(tmp_path / "run").scalars == {}
    (tmp_path / "files" / "vitx").mkdir(parents=True)
    (tmp_path / "files" / "vitx" / "vitx-maps-000000.png").write_bytes(b"")
    with pytest.raises(VitxError, match=r"cannot read the picture that .*files logged at step 0 .*damaged"):
        open_run(tmp_path / "files")
