"""`vitx explain`: its output, its refusals, on two processes, and killed midway."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import vitx
from tests import models
from tests.processes import run_together, start_apart
from vitx.cli import main, many
from vitx.cli.findings import Product
from vitx.cli.folder import linked
from vitx.inputs.preprocessing import Preprocessing

NAME = "deit_tiny_patch16_224"
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


ALONE = ("accelerator=cpu", "workers=1")


def tiny(classes=7, **overrides):
    return models.spread(timm.create_model(NAME, num_classes=classes, **(OPTIONS | overrides))).eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tiny().state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Return a folder of five pictures, some nested or oddly named, and two files that are not images."""
    generator = np.random.default_rng(0)
    made = tmp_path / "photos"
    (made / "deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/a.png", "deep/c d \N{SNOWMAN}.png", "-dash.png"):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(made / name)
    (made / "text.jpg").write_text("no picture")
    (made / "broken.jpg").write_bytes((made / "b.jpg").read_bytes()[:300])
    return made


def command(*words, weights, options=OPTIONS):
    model = ["--model", NAME, "--weights", str(weights), "--model-options", json.dumps(options)]
    running = [] if "--run-options" in words else ["--run-options", *ALONE]
    return ["explain", *map(str, words), *model, *running]


def written(folder, suffix=".png"):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{suffix}"))


def shards(output):
    """Return the names of the pictures in each shard."""
    return [np.load(path)["files"].tolist() for path in sorted((output / "shards").glob("*.npz"))]


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


class TestFiles:
    def test_a_folder(self, folder, weights, tmp_path, capsys):
        output = tmp_path / "maps"
        words = ["--output", output, "--save", "png", "maps", "json", "--method", "rollout", "grad_rollout"]
        assert main(command(folder, *words, "--batch-size", 2, weights=weights)) == 1
        good = ["-dash.png", "a.png", "b.jpg", "deep/a.png", "deep/c d \N{SNOWMAN}.png"]
        for suffix in (".png", ".npz", ".json"):
            found = [name for name in written(output, suffix) if name != "vitx.json"]
            assert found == sorted(name + suffix for name in good)
        said = capsys.readouterr()
        assert [line.split(":")[0] for line in said.err.splitlines()] == ["skipped", "skipped"]
        assert "text.jpg is not an image file" in said.err
        assert "broken.jpg could not be read" in said.err
        assert "5 pictures explained, 2 skipped" in said.out
        assert not list(output.rglob("*.part"))

    def test_what_is_in_them(self, folder, weights, tmp_path):
        output = tmp_path / "maps"
        words = ["--output", output, "--save", "png", "json", "maps", "--method", "grad_rollout", "rollout"]
        assert main(command(folder / "a.png", *words, "--target", "predicted", 5, weights=weights)) == 0
        model, images = tiny(), folder / "a.png"
        found = {target: vitx.explain(model, images, "grad_rollout", target=target) for target in (None, 5)}
        best = int(found[None].target[0])
        facts = json.loads((output / "a.png.json").read_text("utf-8"))
        assert facts["prediction"] == best
        assert facts["probability"] == pytest.approx(found[None].logits[0].softmax(-1)[best].item(), abs=1e-5)
        assert [(made["method"], made["target"]) for made in facts["maps"]] == [
            ("rollout", None),
            ("grad_rollout", best),
            ("grad_rollout", 5),
        ]
        assert all(Path(path).is_file() for path in facts["files"])
        assert json.loads((output / "explanations.jsonl").read_text("utf-8")) == facts
        with np.load(output / "a.png.npz", allow_pickle=False) as arrays:
            assert np.allclose(arrays["grad_rollout_5"], found[5].maps[0], rtol=1e-4, atol=1e-7)
            assert np.allclose(arrays[f"grad_rollout_{best}"], found[None].maps[0], rtol=1e-4, atol=1e-7)
            assert np.allclose(arrays["rollout"], vitx.explain(model, images).maps[0], rtol=1e-4, atol=1e-7)
            assert np.allclose(arrays["logits"], found[5].logits[0], rtol=1e-4, atol=1e-5)
        picture = Image.open(output / "a.png.png")
        assert picture.width == 5 + 4 * (224 + 5)  # the input and three maps

    def test_both_signs(self, folder, weights, tmp_path, capsys):
        out = tmp_path / "out"
        words = (folder / "a.png", "--signed", "--save", "png", "maps", "--output", out)
        assert main(command(*words, "--method", "evidence", weights=weights)) == 0
        with np.load(out / "a.png.npz") as arrays:
            (name,) = [name for name in arrays if name.startswith("evidence")]
            assert arrays[name].min() < 0 < arrays[name].max()
        drawn = np.asarray(Image.open(out / "a.png.png")).astype(int)
        legend = drawn[-30, 5:-5]
        assert legend[0][2] - legend[0][0] > 100
        assert legend[-1][0] - legend[-1][2] > 100
        assert (legend[len(legend) // 2] > 240).all()  # blue, white in the middle, red
        assert main(command(*words, weights=weights)) == 0  # defaults to evidence alone
        assert main(command(*words, "--method", "rollout", weights=weights)) == 2
        assert "--signed needs a method with signed maps, and rollout has none" in capsys.readouterr().err

    def test_the_trace_of_a_picture(self, folder, weights, tmp_path, capsys):
        """The trace lists each step and its module; all relevance starts at the head; nothing is written."""
        file = folder / "a.png"
        assert main(command(file, "--trace", "--output", tmp_path / "none", weights=weights)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["step", "module", "operator", "output", "relevance"]
        assert any("blocks.1.attn.qkv" in line and "linear" in line for line in lines)
        assert lines[-1].split()[1] == "head"
        assert lines[-1].endswith("1.0000")
        assert not (tmp_path / "none").exists()

    @pytest.mark.parametrize(("kind", "known"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
    def test_formats(self, folder, weights, tmp_path, kind, known):
        Image.new("RGB", (40, 40), (90, 140, 190)).save(folder / "flat.png")
        output = tmp_path / "maps"
        for words in ([], ["--save", kind]):
            assert main(command(folder / "flat.png", *words, "--output", output, weights=weights)) == 0
        found, wanted = (Image.open(output / f"flat.png.{suffix}") for suffix in (kind, "png"))
        assert found.format == known
        assert found.size == wanted.size
        assert np.abs(np.subtract(found, wanted, dtype=float)).mean() < 3

    def test_maps_alone(self, folder, weights, tmp_path):
        output = tmp_path / "maps"
        words = ("--save", "maps", "--output", output)
        assert main(command(folder / "a.png", *words, weights=weights)) == 0
        assert sorted(path.name for path in output.iterdir()) == ["a.png.npz", "vitx.json"]

    def test_a_page_to_click(self, folder, weights, tmp_path, monkeypatch, capsys):
        opened, output = [], tmp_path / "maps"
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
        words = ["--output", output, "--open", "--target", "3", "--method", "evidence"]
        assert main(command(folder / "a.png", folder / "text.jpg", *words, weights=weights)) == 1
        assert main(command(folder, *words, "--html", "--save", "json", weights=weights)) == 1
        page = (output / "map.html").read_text(encoding="utf-8")
        assert page.count("data:image/jpeg") == 5
        assert "class 3 (" in page
        assert opened == [(output / name).as_uri() for name in ("a.png.png", "map.html")]
        assert f"a page to click: see {output / 'map.html'}\n" in capsys.readouterr().out
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert linked(tmp_path) == f"\033]8;;{tmp_path.as_uri()}\033\\{tmp_path}\033]8;;\033\\"

    def test_rollout_stands_beside_evidence(self, folder, weights, tmp_path, capsys):
        """Both are drawn by default, but only rollout if evidence does not take the options."""
        words = (folder / "a.png", "--save", "png", "maps", "--output", tmp_path / "maps")
        assert main(command(*words, weights=weights)) == 0
        best = int(tiny()(vitx.explain(tiny(), folder / "a.png").images).argmax())
        with np.load(tmp_path / "maps" / "a.png.npz") as arrays:
            assert set(arrays) == {"logits", "rollout", f"evidence_{best}"}
        assert Image.open(tmp_path / "maps" / "a.png.png").width == 5 + 3 * (224 + 5)
        words = (*words, "--method-options", "discard_ratio=0.5")  # an option that evidence does not take
        assert main(command(*words, weights=weights)) == 0
        with np.load(tmp_path / "maps" / "a.png.npz") as arrays:
            assert set(arrays) == {"logits", "rollout"}

    def test_all_maps_at_once(self, folder, weights, tmp_path, monkeypatch, capsys):
        opened, files = [], [folder / "a.png", folder / "b.jpg", folder / "deep" / "a.png"]
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
        words = ("--overview", "--open", "--output", tmp_path / "maps", "--batch-size", 2)
        assert main(command(*files, folder / "text.jpg", *words, weights=weights)) == 1
        path = tmp_path / "maps" / "overview.png"
        assert opened == [path.as_uri()]
        assert f"all pictures at once: see {path}\n" in capsys.readouterr().out
        wanted = vitx.explain(tiny(), files, "evidence").overview()
        drawn = np.asarray(Image.open(path))
        assert drawn.shape == wanted.shape
        assert np.abs(drawn.astype(int) - wanted).max() <= 2

    def test_one_class_against_another(self, folder, weights, tmp_path, capsys):
        output = tmp_path / "maps"
        words = ["--method", "rollout", "evidence", "--target", 5, 2, "--against", 3]
        words += ["--save", "png", "maps", "json"]
        assert main(command(folder / "a.png", *words, "--output", output, weights=weights)) == 0
        assert "why 5 or 2 and not 3" in capsys.readouterr().out
        with np.load(output / "a.png.npz") as arrays:
            assert set(arrays) == {"logits", "rollout", "evidence_5_not_3", "evidence_2_not_3"}
            for target in (5, 2):
                wanted = vitx.explain(
                    tiny(),
                    folder / "a.png",
                    "evidence",
                    target=lambda logits, own=target: logits[:, own] - logits[:, 3],
                )
                assert np.allclose(arrays[f"evidence_{target}_not_3"], wanted.maps[0], rtol=1e-3, atol=1e-6)
        facts = json.loads((output / "a.png.json").read_text("utf-8"))
        told = [(one["target"], one.get("against")) for one in facts["maps"]]
        assert told == [(None, None), (5, 3), (2, 3)]

    def test_a_leading_dash_comes_after_two(self, folder, weights, monkeypatch, capsys):
        monkeypatch.chdir(folder)
        first, *rest = command(weights=weights)
        assert main([first, *rest, "--output", "maps", "--", "-dash.png"]) == 0
        assert written(folder / "maps") == ["-dash.png.png"]

    def test_what_an_earlier_run_wrote_is_no_input(self, folder, weights):
        for _ in range(2):
            main(command(folder, "--output", folder / "maps", weights=weights))
        assert len(written(folder / "maps")) == 5

    def test_proportions_are_kept(self, folder, weights, tmp_path):
        output = tmp_path / "maps"
        Image.new("RGB", (120, 40), "red").save(folder / "wide.png")
        words = [folder / "wide.png", "--input-options", "keep_aspect=true", "--save", "maps"]
        words += ["--output", output]
        assert main(command(*words, weights=weights)) == 0
        with np.load(output / "wide.png.npz") as arrays:
            assert arrays["rollout"].shape == (2, 7)


class TestShards:
    METHODS = ("--method", "rollout", "grad_rollout", "--target", "predicted", 5)

    def test_hold_what_single_files_hold(self, folder, weights, tmp_path, monkeypatch):
        monkeypatch.setattr("vitx.cli.many.SHARD", 2)
        single, output = tmp_path / "single", tmp_path / "sharded"
        main(command(folder, "--save", "maps", "--output", single, *self.METHODS, weights=weights))
        words = ("--save", "shards", "--output", output, *self.METHODS)
        assert main(command(folder, *words, weights=weights)) == 1
        assert [len(names) for names in shards(output)] == [2, 2, 1]
        for path in sorted((output / "shards").iterdir()):
            with np.load(path, allow_pickle=False) as arrays:
                for row, name in enumerate(arrays["files"]):
                    with np.load(single / f"{name}.npz") as wanted:
                        best = arrays["grad_rollout_predicted_target"][row]
                        assert best == wanted["logits"].argmax()
                        for key in ("logits", "rollout", "grad_rollout_5"):
                            assert np.array_equal(arrays[key][row], wanted[key])
                        assert np.array_equal(
                            arrays["grad_rollout_predicted"][row], wanted[f"grad_rollout_{best}"]
                        )

    def test_a_picture_that_was_lost_is_in_no_second_one(self, folder, weights, tmp_path):
        output = tmp_path / "maps"
        arguments = command(folder, "--save", "png", "shards", "--output", output, weights=weights)
        main(arguments)
        (output / "a.png.png").unlink()
        assert main([*arguments, "--resume"]) == 1
        assert (output / "a.png.png").is_file()
        assert [len(names) for names in shards(output)] == [5]

    def test_are_not_mixed_with_those_of_another_run(self, folder, weights, tmp_path, capsys):
        arguments = command(folder, "--save", "png", "shards", "--output", tmp_path / "maps", weights=weights)
        main(arguments)
        capsys.readouterr()
        assert main(arguments) == 2
        assert "holds maps of an earlier run: continue it with --resume" in capsys.readouterr().err


class TestModels:
    def test_another_normalization(self, folder, weights, tmp_path):
        """The picture shows what the model saw, in the original colors."""
        output, path = tmp_path / "maps", folder / "flat.png"
        Image.new("RGB", (40, 40), (90, 140, 190)).save(path)
        words = [path, "--input-options", "mean=0.1,0.2,0.3", "std=0.4", "--output", output]
        assert main(command(*words, weights=weights)) == 0
        middle = Image.open(output / "flat.png.png").getpixel((5 + 112, 38 + 112))
        assert np.abs(np.subtract(middle, (90, 140, 190))).max() <= 1

    def test_a_lightning_module(self, folder, tmp_path, monkeypatch):
        import lightning.pytorch as pl

        from train_demo import Classifier

        module = Classifier(4, model_options=OPTIONS)
        trainer = pl.Trainer(barebones=True)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
        output = tmp_path / "maps"
        words = ["--model", "train_demo:Classifier", "--weights", tmp_path / "a.ckpt", "--save", "json"]
        words += ["--class-names", tmp_path / "names.txt", "--method", "evidence", "--target", "bee"]
        arguments = ["explain", folder / "a.png", *words, "--output", output]
        assert main([str(word) for word in arguments]) == 0
        (made,) = json.loads((output / "a.png.json").read_text())["maps"]
        assert (made["target"], made["target_name"]) == (1, "bee")


def test_what_cannot_be_prepared_is_skipped_with_a_sentence(folder, weights, tmp_path, monkeypatch, capsys):
    """For example, a crop of a large picture may be more than Pillow allows."""
    prepare = Preprocessing.__call__

    def failing(self, picture):
        if picture.getpixel((0, 0)) == (1, 2, 3):
            raise Image.DecompressionBombError("too large")
        return prepare(self, picture)

    monkeypatch.setattr(Preprocessing, "__call__", failing)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "c.png")
    files = [folder / "c.png", folder / "a.png"]
    assert main(command(*files, "--output", tmp_path / "maps", weights=weights)) == 1
    assert "c.png could not be prepared: DecompressionBombError: too large" in capsys.readouterr().err


class TestPlaces:
    """Every picture has its own place below the output, whatever its path."""

    def test_names_that_go_up(self, folder, weights, tmp_path, monkeypatch):
        work, output = folder / "deep", tmp_path / "maps"
        monkeypatch.chdir(work)
        paths = ["../a.png", "a.png", "../deep/a.png"]  # the last two are the same file
        assert main(command(*paths, "--output", output, weights=weights)) == 0
        assert written(tmp_path, ".png.png") == ["maps/a.png.png", "maps/deep/a.png.png"]

    def test_an_output_that_goes_up_is_no_input(self, folder, weights, monkeypatch):
        monkeypatch.chdir(folder / "deep")
        for _ in range(2):
            main(command("..", "--output", "../maps", weights=weights))
        assert len(written(folder / "maps")) == 5


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


def damaged(folder, name):
    path = folder / name
    if name == "tiny.png":
        Image.new("RGB", (1, 1)).save(path)
    if name == "bomb.png":
        Image.new("1", (20_000, 20_000)).save(path)
    return path


class TestRefusals:
    """Each refusal is one sentence with exit status 2, and nothing is written."""

    def refused(self, arguments, capsys, output):
        try:
            status = main([str(word) for word in arguments])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert not output.exists()
        said = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in "".join(said)
        assert said[-1].startswith("error: ")
        return "\n".join([*said, ""])

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("absent.jpg", "there is no file or folder"),
            ("*.bmp", "nothing matches"),
            ("text.jpg", "is not an image file that can be read"),
            ("broken.jpg", "could not be read, it may be damaged"),
            ("tiny.png", "1 x 1 pixels: at least 8 x 8"),
            ("bomb.png", "more than the 100,000,000 that are allowed"),
        ],
    )
    def test_files(self, folder, weights, tmp_path, capsys, name, sentence):
        output = tmp_path / "maps"
        arguments = command(damaged(folder, name), "--output", output, weights=weights)
        assert sentence in self.refused(arguments, capsys, output)

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (
                ["--method-options", "discard_ratio=1.5"],
                "discard_ratio must be at least 0 and below 1, found 1.5",
            ),
            (["--method-options", "discard_ratio=x"], "discard_ratio must be"),
            (["--method-options", "head_fusion=sum"], "head_fusion must be one of mean, max, min"),
            (["--method", "rollout", "gae", "--method-options", "head_fusion=max"], "gae has no option"),
            (["--method-options", "start_layer=9"], "start_layer must be from 0 to 1"),
            (["--method-options", "start_layer"], "--method-options takes KEY=VALUE, found 'start_layer'"),
            (["--method", "nope"], "there is no method 'nope'"),
            (["--method", "rollout", "--target", 7], "--target 7 needs a method for classes, not rollout:"),
            (["--method", "rollout", "attention", "--target", 7], "classes, not rollout or attention: add"),
            (["--target", "tabby"], "the class names are unknown"),
            (["--target", 7], "there is no class 7"),
            (["--against", 1], "--against compares two classes: name both"),
            (["--target", 1, "--against", 1], "--target and --against are the same class, 1"),
            (["--method", "rollout", "--against", 2], "--against needs a method for classes"),
            (["--batch-size", 0], "--batch-size must be at least 1"),
            (["--model", "own:Net"], "there is no class or function own:Net"),
            (["--input-options", "mean=0.5,0.5"], "mean has 2 values"),
            (["--input-options", "std=0"], "std must be above 0"),
            (["--input-options", "size=0"], "--input-options: size must be a whole number from 1, found 0"),
            (["--input-options", "width=3"], "--input-options has no 'width': it takes size, frames"),
            (["--run-options", "workers=0"], "--run-options: workers must be a whole number from 1, found 0"),
            (["--save", "gif"], "--save takes png, webp, jpg, maps, json, shards, found gif\n"),
            (["--save", __file__], f"found {__file__}: paths come before the options"),
            (["--trace", "--html"], "--trace writes nothing: leave out --html"),
            (["--trace", "--save", "maps"], "--trace writes nothing: leave out --save"),
            (["--target", -1], "there is no class -1: the model has classes 0 to 6"),
            (["--region", 1, 0, 0, 8, 8], "the output is (5, 7): ask about a class, since it has no spatial"),
            (["--patch", 4, 2], "there is no patch in row 4, column 2: there are rows 0 to 3 and columns"),
            (
                ["--save", "shards", "--input-options", "keep_aspect=true"],
                "--save shards needs maps of one size",
            ),
            (["--overview", "--resume"], "--overview needs all pictures in one process: leave out --resume"),
            (["--run-options", "accelerator=gpu"], "torch can use no gpu here"),
            (["--run-options", "devices=foo"], "Lightning's Trainer does not take these settings"),
            (["--run-options", "accelerator=nope"], "Lightning's Trainer does not take these settings"),
            (["--model-options", "img_size=big"], "does not take these options"),
            (["--output", ""], "--output is empty"),
            (["--output", __file__], f"--output is the file {__file__}: give a folder"),
            (["--class-names", "absent.txt"], "the class names could not be read"),
            (["--class-names", __file__], "must name 7 classes, one a line: found "),
            (["--nope", 3], "--nope"),
        ],
    )
    def test_options(self, folder, weights, tmp_path, capsys, words, sentence):
        output = tmp_path / "maps"
        arguments = [*command(folder, "--output", output, weights=weights), *words]
        assert sentence in self.refused(arguments, capsys, output)

    @pytest.mark.parametrize(
        ("model", "sentence"),
        [
            (["--model", "deit_tinny_patch16_224", "--weights", "{}"], "similar names: deit_tiny"),
            (["--model", "resnet10t", "--weights", "{}"], "holds weights of another model"),
            (["--model", NAME, "--weights", "absent.pth"], "there is no weights file absent.pth"),
            (["--model", "train_demo:Classifier", "--weights", "absent.ckpt"], "there is no weights file"),
            (["--model", "absent/folder/", "--weights", "{}"], "there is no folder absent/folder/"),
            (["--model", "hf-hub:openai"], "there is no folder openai, and hf-hub: takes owner/name"),
            (["--model", "tests/"], "tests/ holds no model that was saved by transformers"),
            (["--model", "{}"], "is a file of weights: give it by --weights"),
        ],
    )
    def test_models(self, folder, weights, tmp_path, capsys, model, sentence):
        output = tmp_path / "maps"
        model = [word.format(weights) for word in model]
        arguments = ["explain", folder, *model, "--output", output]
        assert sentence in self.refused(arguments, capsys, output)

    def test_a_model_without_attention(self, folder, tmp_path, capsys):
        torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "a.pth")
        output = tmp_path / "maps"
        arguments = ["explain", folder, "--model", "resnet10t", "--weights", tmp_path / "a.pth"]
        said = self.refused([*arguments, "--output", output], capsys, output)
        assert "no attention between tokens was found" in said

    def test_an_output_that_cannot_be_written(self, folder, weights, tmp_path, capsys):
        (tmp_path / "file").write_text("here")
        output = tmp_path / "file" / "maps"
        arguments = command(folder, "--output", output, weights=weights)
        assert "could not be written" in self.refused(arguments, capsys, output)
