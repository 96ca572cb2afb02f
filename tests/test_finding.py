"""Runs are found by their folders, and named by the path that the user gave."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.played_runs import maps, open_run, write, write_run
from vitx import VitxError
from vitx.cli import main
from vitx.runs.saved import names_apart, open_runs, read_run


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("logs/demo/version_0", "logs/demo/version_0"),
        ("logs/demo/version_0/vitx", "logs/demo/version_0"),
        ("logs", "logs/demo/version_0"),
        (".", "logs/demo/version_0"),
        ("{}", "here/logs/demo/version_0"),
        ("{}/logs/demo/version_0/", "demo/version_0"),
    ],
)
def test_a_run_is_found_from_wherever_and_its_path_is_not_the_machines(place, path, tmp_path, monkeypatch):
    home = tmp_path / "here"
    write_run(home / "logs" / "demo" / "version_0", steps=(0,))
    monkeypatch.chdir(home)
    assert open_run(place.format(home)).path.as_posix().endswith(path)
    assert not open_run(place.format(home)).path.is_absolute()


def test_from_within_its_folder_a_run_is_named_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(write_run(tmp_path / "demo", steps=(0,)))
    assert {open_run(place).path.as_posix() for place in (".", "vitx", "../demo")} == {"demo", "../demo"}


def test_runs_are_named_by_what_tells_them_apart_in_their_natural_order(tmp_path):
    for name in ("version_10", "version_2"):
        write_run(tmp_path / "logs" / name, steps=(0,))
    runs, left_out = open_runs([tmp_path, tmp_path / "logs" / "version_2"])
    assert ([*runs], left_out) == (["version_2", "version_10"], {})


def test_what_stands_next_to_the_root_is_in_no_name(tmp_path, monkeypatch):
    places = [tmp_path / part / "logs" / "run" for part in "ab"]
    for place in places:
        write_run(place, steps=(0,))
    monkeypatch.setattr(Path, "resolve", lambda path: Path("/", *path.parts[-4:]))  # as on two disks
    monkeypatch.setattr(
        "vitx.runs.saved.read_run", lambda folder, path: read_run(tmp_path / folder.relative_to("/"), path)
    )
    assert [*open_runs(places)[0]] == ["logs/run", "logs/run (2)"]


def test_a_copied_folder_and_one_of_another_name_are_runs(tmp_path):
    write_run(tmp_path / "a", steps=(0,))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert [*open_runs([tmp_path])[0]] == ["a", "b"]
    (tmp_path / "b" / "vitx").rename(tmp_path / "kept")
    assert open_run(tmp_path / "kept").path.name == "kept"


def older(folder, step):
    """Write maps as vitx 0.2 did."""
    folder.mkdir(parents=True)
    np.savez(folder / f"maps-{step:06d}.npz", **maps(step))


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("absent", r"there is no folder .*absent"),
        ("file.txt", r"file.txt is a file: give the folder of a run"),
        ("empty", r"empty holds no run: neither it nor a folder below has a file vitx/run.json"),
        ("pictures", r"pictures holds no run: .* unless save_maps=False"),
        ("old", r"old/vitx is of vitx 0.2 and has no run.json: play it back with vitx 0.2"),
        ("killed", r"killed/vitx holds no maps: the training ended before any were written"),
    ],
)
def test_what_is_no_single_run_is_said_in_a_sentence(place, sentence, tmp_path):
    (tmp_path / "file.txt").write_text("no run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures" / "vitx").mkdir(parents=True)
    (tmp_path / "pictures" / "vitx" / "vitx-maps-000000.png").write_bytes(b"")
    older(tmp_path / "old" / "vitx", 4)
    write(tmp_path / "killed", "write_facts", {"model": "vit"})
    with pytest.raises(VitxError, match=sentence):
        open_run(tmp_path / place)


def test_from_within_its_folder_a_run_of_0_2_is_said_to_be_one(tmp_path, monkeypatch):
    older(tmp_path / "old" / "vitx", 4)
    monkeypatch.chdir(tmp_path / "old")
    with pytest.raises(VitxError, match=r"^old/vitx is of vitx 0.2 and has no run.json"):
        open_run(".")


@pytest.mark.parametrize("told", [b"", b"{", b"[]", json.dumps({"of": "another program"}).encode()])
def test_a_damaged_run_is_named_and_takes_no_other_with_it(told, tmp_path, capsys):
    write_run(tmp_path / "good", steps=(0,))
    (write_run(tmp_path / "bad", steps=(0,)) / "vitx" / "run.json").write_bytes(told)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().err
    assert "left out bad: cannot read " in said
    assert "run.json: it is damaged, or another program's" in said
    assert "good: what the model looks at" in (tmp_path / "page.html").read_text("utf-8")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / "good", steps=(0,))
    closed = tmp_path / "closed"
    closed.mkdir()

    def walk(top, onerror):
        yield str(tmp_path / "good" / "vitx"), [], ["run.json"]
        onerror(PermissionError(13, "Permission denied", str(closed)))

    monkeypatch.setattr("os.walk", walk)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != closed)
    runs, left_out = open_runs([tmp_path])
    assert [*runs] == ["good"]
    assert left_out["closed"].endswith("closed cannot be read: permission denied")


def test_checkpoints_are_told_apart_like_runs():
    assert names_apart([Path("runs/a/last"), Path("runs/b/last")]) == ["a", "b"]
    assert names_apart([Path("a"), Path("a")]) == ["a", "a (2)"]
    assert names_apart([Path("/runs/first"), Path("last")]) == ["first", "last"]
    assert names_apart([Path("/runs/a"), Path("a")]) == ["runs", "a"]
