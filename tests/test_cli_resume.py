"""`vitx explain` that is interrupted or killed, alone and in two processes, and goes on."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.explain_command import ALONE, command, shards, tiny, written
from tests.processes import run_together, start_apart
from vitx.cli import main, many
from vitx.cli.findings import Product


def in_small_shards(words):
    many.SHARD = 8
    return main(words)


def as_a_module(words):
    """Run the command as `python -m vitx` does, which Lightning starts again for its other processes."""
    sys.argv[1:], sys.modules["__main__"].__spec__ = words, find_spec("vitx.__main__")
    return main(words)


def wait_for(output, process):
    """Wait until some pictures are written, or the process has ended."""
    deadline = time.monotonic() + 120
    while len(written(output)) < 4 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)


class TestResume:
    def run(self, folder, output, weights, *words):
        return main(command(folder, "--output", output, *words, weights=weights))

    def test_only_what_is_left_is_done(self, folder, weights, tmp_path, capsys):
        output = tmp_path / "maps"
        self.run(folder, output, weights)
        (output / "a.png.png").unlink()
        times = {name: (output / name).stat().st_mtime_ns for name in written(output)}
        capsys.readouterr()
        assert self.run(folder, output, weights, "--resume") == 1
        assert "4 of 7 pictures are already finished" in capsys.readouterr().out
        assert len(written(output)) == 5
        assert all((output / name).stat().st_mtime_ns == before for name, before in times.items())

    def test_all_done(self, folder, weights, tmp_path, capsys):
        output = tmp_path / "maps"
        assert self.run(folder / "a.png", output, weights) == 0
        assert self.run(folder / "a.png", output, weights, "--resume") == 0
        assert "0 pictures explained" in capsys.readouterr().out

    def test_other_options_are_refused(self, folder, weights, tmp_path, capsys):
        output = tmp_path / "maps"
        self.run(folder, output, weights)
        assert self.run(folder, output, weights, "--resume", "--method-options", "start_layer=1") == 2
        assert "were made with other options" in capsys.readouterr().err

    def test_another_model_at_the_same_path_is_refused(self, folder, tmp_path, capsys):
        path, output = tmp_path / "changed.safetensors", tmp_path / "maps"
        model = tiny()
        for number in range(2):
            with torch.no_grad():
                model.blocks[1].mlp.fc1.weight[5, 5] += number  # same file size, changed in the middle
            save_file(model.state_dict(), path)
            words = ("--resume",) * number
            assert self.run(folder / "a.png", output, path, *words) == 2 * number
        assert "with other options or another model" in capsys.readouterr().err

    def test_what_another_method_left_is_not_taken_for_finished(self, folder, weights, tmp_path):
        """A run is stopped while it replaces the maps of an earlier run with those of another method."""
        output = tmp_path / "maps"
        self.run(folder, output, weights, "--method", "rollout", "--save", "maps")
        evidence = ("--method", "evidence", "--save", "maps")
        write = Product.write

        def stopped(self, finding, paths):
            if finding.place:
                raise KeyboardInterrupt
            return write(self, finding, paths)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Product, "write", stopped)
            assert self.run(folder, output, weights, *evidence) == 130
        self.run(folder, output, weights, *evidence, "--resume")
        for path in output.rglob("*.npz"):
            assert any(name.startswith("evidence") for name in np.load(path))

    def test_pictures_that_cannot_be_read_leave_an_earlier_run_alone(self, folder, weights, tmp_path):
        output = tmp_path / "maps"
        self.run(folder / "a.png", output, weights)
        before = {path: path.read_bytes() for path in output.iterdir()}
        assert self.run(folder / "text.jpg", output, weights, "--method-options", "start_layer=1") == 2
        assert {path: path.read_bytes() for path in output.iterdir()} == before

    @pytest.mark.slow
    def test_interrupted_in_the_middle(self, folder, weights, tmp_path):
        for number in range(60):
            Image.new("RGB", (40, 40), (number, 9, 9)).save(folder / f"many-{number:03d}.png")
        output = tmp_path / "maps"
        words = command(folder, "--output", output, "--batch-size", 2, weights=weights)
        process = start_apart(main, words)
        wait_for(output, process)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
        before = {name: (output / name).stat().st_mtime_ns for name in written(output)}
        assert 4 <= len(before) < 65
        for name in before:
            Image.open(output / name).load()  # each file is complete
        assert self.run(folder, output, weights, "--resume") == 1
        assert len(written(output)) == 65
        assert all((output / name).stat().st_mtime_ns == time for name, time in before.items())
        assert not list(output.rglob("*.part"))


@pytest.mark.slow
def test_the_model_alone_was_killed(folder, weights, tmp_path):
    """The processes that draw and write end with it, and the next run completes the output."""
    for number in range(60):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(folder / f"many-{number:03d}.png")
    output = tmp_path / "maps"
    words = command(
        folder, "--output", output, "--save", "png", "shards", "--run-options", "workers=2", weights=weights
    )
    process = start_apart(in_small_shards, words)
    wait_for(output, process)
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while subprocess.run(["pgrep", "-g", str(process.pid)], stdout=subprocess.DEVNULL).returncode == 0:
        assert time.monotonic() < deadline, "its writers live on"
        time.sleep(0.05)
    assert 4 <= len(written(output)) < 65
    for name in written(output):
        Image.open(output / name).load()  # each file is complete
    assert main([*words, "--resume"]) == 1
    assert len(written(output)) == 65
    assert not list(output.rglob("*.part"))
    names = [name for names in shards(output) for name in names]
    assert len(names) == len(set(names)) == 65


def explain_in_one_of_two(arguments, log):
    write = Product.write

    def logged(self, finding, paths):
        with Path(f"{log}-{os.environ['RANK']}").open("a") as opened:
            opened.write(f"{finding.file.name}\n")
        return write(self, finding, paths)

    Product.write = logged
    status = main(arguments)
    assert status == (1 if os.environ["RANK"] == "0" else 0)


@pytest.mark.slow
def test_two_processes_share_the_pictures_and_go_on_when_killed(folder, weights, tmp_path):
    for number in range(60):
        Image.new("RGB", (40, 40), (number, 9, 9)).save(folder / f"many-{number:03d}.png")
    output, log = tmp_path / "maps", tmp_path / "log"
    words = ["--run-options", "devices=2", "strategy=ddp", *ALONE, "--batch-size", 2, "--output", output]
    words += ["--save", "png", "json", "--method", "rollout"]
    process = start_apart(as_a_module, command(folder, *words, weights=weights))
    wait_for(output, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    before = written(output)
    assert 4 <= len(before) < 65
    for name in before:
        Image.open(output / name).load()  # each file is complete
    finished = {name for name in before if (output / name).with_suffix(".json").is_file()}
    run_together(2, explain_in_one_of_two, command(folder, *words, "--resume", weights=weights), log)
    shares = [Path(f"{log}-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert all(shares)
    assert len(shares[0]) + len(shares[1]) == 65 - len(finished)  # so each one once, since all are there:
    assert len(written(output)) == 65
    lines = (output / "explanations.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 65
