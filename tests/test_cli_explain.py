"""`vitx explain`: what it writes for pictures, and where."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitx
from tests.explain_command import OPTIONS, command, shards, tiny, written
from vitx.cli import main
from vitx.cli.folder import linked
from vitx.inputs.preprocessing import Preprocessing


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
