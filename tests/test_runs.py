"""The files of a run are read as they were written; errors in them are reported in a sentence."""

import io

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from tests import run_folders
from tests.lightning_models import fit
from tests.played_runs import (
    CLASSES,
    COUNT,
    LABELS,
    LOGITS,
    STEPS,
    maps,
    open_run,
    pixels,
    same,
    write,
    write_firing,
    write_images,
    write_run,
)
from vitx import VitxError
from vitx.callbacks import RolloutCallback
from vitx.files import encode
from vitx.runs.run import rank


def test_a_run_is_read_as_it_was_written(tmp_path):
    run = open_run(write_run(tmp_path / "run", colormap="viridis", note="of the likeliest class"))
    assert (run.steps, run.count, [*run.titled]) == (STEPS, COUNT, ["attention rollout", "gradient rollout"])
    for firing, step in enumerate(STEPS):
        for name, expected in maps(step).items():
            assert same(run.maps[name][firing], expected.astype(np.float16))
        assert same(run.logits[firing], LOGITS)
    assert same(run.pixels, pixels())
    assert same(run.labels, LABELS)
    assert (run.facts["colormap"], run.facts["note"]) == ("viridis", "of the likeliest class")
    assert run.facts["class_names"] == CLASSES
    assert run.numbers["val/accuracy"] == {4: 0.5, 9: 0.5}
    assert run.numbers["vitx/rollout/entropy"] == {0: 0.9, 4: 0.8, 9: 0.7}
    assert "step" not in run.numbers


@pytest.mark.parametrize("options", [{}, {"save_maps": "all"}])
def test_a_real_run_is_played_back_as_it_was_logged(options, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", version=0)
    names = ["cat", "dog", "newt"]
    watching = {"num_images": (2, 3), "class_names": names, "colormap": "viridis", "on_error": "raise"}
    fit(RolloutCallback(**watching, **options), logger=logger)
    run = open_run(tmp_path)
    assert (run.path.name, run.steps, run.count) == ("version_0", (0, 3, 7), 2)
    assert (run.facts["model"], run.facts["ended"]) == ("SmallClassifier", True)
    assert [*run.numbers["val/loss"]] == [3, 7]
    assert [*run.numbers["vitx/rollout/entropy"]] == [0, 3, 7]
    events = run_folders.events(logger.log_dir).Images("vitx/maps")
    for firing, event in enumerate(events):
        encode(again := io.BytesIO(), run.grid(firing, range(2)), ".jpg")
        files = io.BytesIO(event.encoded_image_string), again
        logged, drawn = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files)
        assert drawn.shape == logged.shape
        assert np.abs(drawn - logged).mean() < 1, "half precision costs a shade here and there"


def test_sinks_are_ringed_as_in_the_training(tmp_path):
    marks = np.zeros((COUNT, 4, 4))
    marks[0, 1, 2] = 1
    found = []
    for name, extra in (("plain", {}), ("ringed", {"sinks": marks})):
        run = write_run(tmp_path / name)
        write_firing(run, STEPS[-1], maps(STEPS[-1]) | extra, LOGITS)
        for step in STEPS[:-1]:
            write_firing(run, step, maps(step) | dict.fromkeys(extra, 0 * marks), LOGITS)
        found.append(open_run(run))
    plain, ringed = found
    assert [*ringed.titled] == [*plain.titled], "sinks are no method"
    assert same(ringed.tiles(0, 0)["attention rollout"], plain.tiles(0, 0)["attention rollout"])
    assert not same(ringed.tiles(-1, 0)["attention rollout"], plain.tiles(-1, 0)["attention rollout"])
    assert len(ringed.grid(-1, [0])) > len(plain.grid(-1, [0])), "the legend says what rings are"


def test_maps_of_all_measured_images_are_those_of_the_shown(tmp_path):
    found = maps(4, 4)
    write_images(tmp_path, 4, pixels()[[0, 2]])
    folder = tmp_path / "vitx" / "images-000004.npz"
    np.savez(folder, pixels=pixels()[[0, 2]], shown=np.array([3, 1]), labels=np.arange(4))
    write_firing(tmp_path, 4, found, np.eye(4))
    run = open_run(tmp_path)
    assert run.labels.tolist() == [3, 1]
    assert same(run.logits[0], np.eye(4, dtype=np.float32)[[3, 1]])
    assert same(run.maps["rollout"][0], found["rollout"].astype(np.float16)[[3, 1]])


def test_no_frame_of_a_clip_reaches_into_the_next(tmp_path):
    maps = np.zeros((1, 4, 2, 2), np.float32)
    maps[0, 0, :, 1] = 1  # the right half of the first frame
    write_images(tmp_path, 1, np.zeros((1, 4, 8, 8, 3), np.uint8))
    write_firing(tmp_path, 1, {"rollout": maps}, np.zeros((1, 3)))
    tile = open_run(tmp_path).tiles(0, 0)["attention rollout"].astype(int).sum(-1)
    assert tile.shape == (8, 4 * 8)
    assert tile[:, 7].min() > 5 * tile[:, 0].max()
    assert tile[:, 8:].max() == tile[:, 0].min()


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "said"),
    [
        (None, [[0, 9]], None, "1 100%"),
        ("class", [[0, 9]], [7], "1 100%"),  # a label that is no class
        ("classes", [[9.0, 9.0]], [[1, 0]], "\N{BALLOT X} 0 + 1, is 0"),
        ("numbers", [[0.25]], [0.5], "0.250, is 0.500"),
        ("shares", [[0.0]], [0.25], "0.500, is 0.250"),
        ("features", [[0.25, 0.5]], None, ""),
    ],
)
def test_captions_say_what_the_training_said(kind, logits, labels, said, tmp_path):
    write_images(tmp_path, 1, pixels(1), None if labels is None else np.array(labels))
    write_firing(tmp_path, 1, maps(1, 1), np.array(logits))
    write(tmp_path, "write_facts", {"kind": kind})
    assert [str(caption) for caption in open_run(tmp_path).captions(0)] == [said]


def test_of_images_that_changed_the_last_are_read_and_the_other_firings_counted(tmp_path):
    write_run(tmp_path)
    write_images(tmp_path, 12, 255 - pixels())
    assert open_run(tmp_path).steps == STEPS, "killed before the first firing with them"
    write_firing(tmp_path, 12, maps(12), LOGITS)
    run = open_run(tmp_path)
    assert (run.steps, run.before) == ((12,), len(STEPS))
    assert same(run.pixels, 255 - pixels())


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [(0.75, "step 4, accuracy 75%"), (91.4, "step 4, accuracy 91%"), (None, "step 4")],
)
def test_a_heading_says_the_accuracy_as_it_was_logged(accuracy, said, tmp_path):
    run = open_run(write_run(tmp_path, accuracy=accuracy))
    assert [run.heading(firing) for firing in (0, 1)] == ["step 0", said]


def test_wrong_and_sure_comes_first_and_then_what_moved(tmp_path):
    found = rank(open_run(write_run(tmp_path)))
    assert [*found] == [2, 1, 0]
    assert found[2].startswith("wrong at the end, and 99% sure; its ")
    assert "moved most from step" in found[1]
    assert found[0] == "its maps stand still"


def deleted(name):
    return lambda run: (run / "vitx" / name).unlink()


def emptied(name):
    return lambda run: (run / "vitx" / name).write_bytes(b"")


def torn(name):
    def tear(run):
        path = run / "vitx" / name
        path.write_bytes(path.read_bytes()[:-30])

    return tear


def without(name, key):
    def take(run):
        with np.load(run / "vitx" / name) as file:
            arrays = {known: values for known, values in file.items() if known != key}
        np.savez(run / "vitx" / name, **arrays)

    return take


def blocked(run):
    (run / "vitx" / "numbers.csv").unlink()
    (run / "vitx" / "numbers.csv").mkdir()


def of_others(run):
    write_firing(run, 12, maps(12, 2), LOGITS[:2])


def of_another_method(run):
    write_firing(run, 12, {"saliency": maps(12)["rollout"]}, LOGITS)


def pickled(run):
    np.savez(run / "vitx" / "firing-000004.npz", logits=np.array([{}]))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (emptied("firing-000004.npz"), "cannot read .*firing-000004.npz"),
        (torn("firing-000004.npz"), "cannot read .*firing-000004.npz"),
        (torn("images-000000.npz"), "cannot read .*images-000000.npz"),
        (pickled, "cannot read .*firing-000004.npz"),
        (lambda run: (run / "vitx" / "numbers.csv").write_bytes(b"step\xff\n"), "cannot read .*numbers.csv"),
        (blocked, "cannot read .*numbers.csv"),
        (without("firing-000004.npz", "logits"), "do not match each other.*logits"),
        (without("images-000000.npz", "shown"), "do not match each other.*shown"),
        (of_others, "do not match each other, so keep those of one training"),
        (of_another_method, "have no method in common"),
        (lambda run: write_images(run, 4, pixels().repeat(2, 0)), "do not match each other"),
        (deleted("images-000000.npz"), "but not their images: copy the whole folder"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(spoil, sentence, tmp_path):
    spoil(write_run(tmp_path))
    with pytest.raises(VitxError, match=sentence):
        open_run(tmp_path)


def test_a_method_that_came_later_is_left_out(tmp_path):
    write_run(tmp_path)
    write_firing(tmp_path, 12, {**maps(12), "late": maps(12)["rollout"]}, LOGITS)
    assert set(open_run(tmp_path).maps) == {"rollout", "grad_rollout"}


def test_files_of_other_names_are_no_firings(tmp_path):
    write_run(tmp_path)
    (tmp_path / "vitx" / "firing-000004 (copy).npz").write_bytes(b"")
    (tmp_path / "vitx" / ".firing-000012.npz.part").write_bytes(b"")
    assert open_run(tmp_path).steps == STEPS
