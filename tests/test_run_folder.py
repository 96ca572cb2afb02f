"""The folder of a run: it belongs to one run, can be resumed, and stays small."""

import csv
import errno
import json
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest

from vitx.runs.folder import RunFolder, files_of

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
SHOWN = np.arange(2)


def claimed(place, step=None):
    """Claim a folder for a run, and write one firing if a step is given."""
    folder = RunFolder.claim(place, place)
    if step is not None:
        fire(folder, step)
    return folder


def fire(folder, *steps):
    for step in steps:
        folder.write_images(step, {"pixels": PIXELS, "shown": SHOWN})
        folder.write_firing(step, {"rollout": np.full((2, 4, 4), step, np.float16)})
        folder.write_numbers({"step": step, "loss": 1 / (1 + step)})


def rows(folder):
    with (folder.path / "numbers.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def steps(folder):
    return list(files_of(folder.path, "firing"))


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("first", {"first", *(f"first-{n}" for n in range(1, 8))}),
        (None, {f"version_{n}" for n in range(1, 9)}),
        ("version_7", {f"version_{n}" for n in range(7, 15)}),
    ],
)
def test_runs_that_start_at_the_same_moment_never_meet(wanted, names, tmp_path):
    (tmp_path / "version_0").mkdir()  # belongs to something else
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: RunFolder.claim(wanted and tmp_path / wanted, tmp_path), range(8))
    folders = list(found)
    assert {folder.path.parent.name for folder in folders} == names
    assert len({folder.id for folder in folders}) == 8


def test_the_working_folder_is_not_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [claimed(tmp_path).path.parent.relative_to(tmp_path).as_posix() for _ in range(3)]
    assert names == [".", "version_1", "version_2"]


def test_goes_on_at_a_step(tmp_path):
    folder = claimed(tmp_path)
    fire(folder, 0, 3, 6, 9)
    folder.close()
    again = RunFolder.reopen(folder.path, folder.id).go_on(6)
    assert again.path == folder.path
    fire(again, 7)
    assert steps(again) == rows(again) == [0, 3, 7]
    assert list(files_of(again.path, "images")) == [0], "the same images are kept twice"


def test_what_an_ended_run_wrote_stays(tmp_path):
    folder = claimed(tmp_path / "run")
    fire(folder, 0, 3, 6)
    folder.end()
    other = RunFolder.reopen(folder.path, folder.id).go_on(4)
    assert other.path == tmp_path / "run-1" / "vitx"
    fire(other, 5)
    assert steps(other) == rows(other) == [0, 3, 5]
    assert steps(folder) == rows(folder) == [0, 3, 6]
    longer = RunFolder.reopen(folder.path, folder.id).go_on(7)
    assert longer.path == folder.path, "nothing of it is void"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock that ends with a process alone")
def test_a_run_that_another_process_writes_is_not_gone_on_with(tmp_path):
    folder = claimed(tmp_path)
    child = os.fork()
    if not child:
        os._exit(int(RunFolder.reopen(folder.path, folder.id) is None))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert RunFolder.reopen(folder.path, folder.id) is not None, "its own process may"
    assert RunFolder.reopen(folder.path, "another") is None


def test_images_that_change_are_kept_from_their_step_on(tmp_path):
    folder = claimed(tmp_path, 0)
    again = np.clip(PIXELS.astype(int) + 1, 0, 255).astype(np.uint8)  # as another decoder reads them
    folder.write_images(3, {"pixels": again, "shown": SHOWN, "labels": np.array([4, 5])})
    folder.write_images(6, {"pixels": 255 - PIXELS, "shown": SHOWN})
    folder.write_images(9, {"pixels": PIXELS, "shown": SHOWN})
    files = files_of(folder.path, "images")
    assert list(files) == [0, 6, 9]
    with np.load(files[0]) as kept:
        assert kept["labels"].tolist() == [4, 5], "what is known of them later is lost"


def test_numbers_that_come_later_have_columns_of_their_own(tmp_path):
    folder = claimed(tmp_path)
    for row in ({"step": 0, "a": 1}, {"step": 2, "b": 2}, {"step": 2, "a": 3}):
        folder.write_numbers(row)
    assert (folder.path / "numbers.csv").read_text().split() == ["step,a,b", "0,1,", "2,3,2"]


def test_a_full_disk_leaves_no_folder_and_no_rest(tmp_path):
    folder = claimed(tmp_path / "run", 0)
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(os, "fsync", side_effect=full):
        for write in (lambda: fire(folder, 0), lambda: folder.write_facts({"model": "vit"}), folder.end):
            with pytest.raises(OSError, match="No space"):
                write()
        with pytest.raises(OSError, match="No space"):
            claimed(tmp_path / "other" / "run")
    assert before == {path: path.read_bytes() for path in folder.path.iterdir()}
    assert not (tmp_path / "other" / "run").exists()


def test_a_copy_of_it_holds_no_lock(tmp_path):
    folder = pickle.loads(pickle.dumps(claimed(tmp_path)))
    folder.write_facts({"model": "vit", "api_key": "sesame", "data": str(tmp_path)})
    said = json.loads((folder.path / "run.json").read_text())
    assert (said["model"], said["api_key"], said["data"]) == ("vit", "***", ".")


def test_a_thousand_firings_are_small(tmp_path):
    """Extrapolated from 50 firings of 8 images of 224 pixels, two methods and 1,000 classes."""
    random = np.random.default_rng(0)
    folder = claimed(tmp_path)
    pixels = random.integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)  # noise does not compress
    folder.write_images(0, {"pixels": pixels, "shown": np.arange(8)})
    once = sum(path.stat().st_size for path in folder.path.iterdir())
    for step in range(50):
        maps = {name: random.random((8, 14, 14)).astype(np.float16) for name in ("rollout", "grad_rollout")}
        folder.write_firing(step, {**maps, "logits": random.random((8, 1000)).astype(np.float16)})
        folder.write_numbers({"step": step, "epoch": 0, **{str(n): random.random() for n in range(20)}})
    firings = sum(path.stat().st_size for path in folder.path.iterdir()) - once
    assert once + 20 * firings < 25e6
