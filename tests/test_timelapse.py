"""The films and strips of a training show what was saved at the steps that they name."""

import numpy as np
import pytest
from PIL import Image

from tests.played_runs import (
    COUNT,
    LOGITS,
    STEPS,
    frames,
    maps,
    open_run,
    pixels,
    write,
    write_firing,
    write_images,
    write_run,
)
from vitx.cli import main
from vitx.cli.timelapse import frame, timeline
from vitx.pictures.render import GAP, LINE, TILE_WIDTH

NEAR = 16  # of 255: how far the 256 colors of a film may be from those of the picture


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "logs" / "demo")


def film(*words):
    return main(["timelapse", *map(str, words)])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_a_film_of_all_and_one_of_each_image_with_a_strip(run, tmp_path, capsys):
    out = tmp_path / "film"
    assert film(run, "--output", out) == 0
    of_each = [f"image-{image}.{kind}" for image in range(COUNT) for kind in ("gif", "png")]
    assert names(out) == sorted(["all.gif", *of_each])
    assert sorted(capsys.readouterr().out.split()) == sorted(str(out / name) for name in names(out))
    opened = open_run(run)
    shown = frames(out / "all.gif")
    assert len(shown) == len(STEPS)
    for firing, picture in enumerate(shown):
        expected = frame({"logs/demo": opened}, opened.position(firing), range(COUNT))
        assert picture.shape == expected.shape
        error = np.abs(picture.astype(int) - expected)
        assert error.mean() < NEAR / 4
        assert np.percentile(error, 99) < NEAR
        assert not error[(expected == 255).all(-1)].any(), "paper is not white"
    assert not np.array_equal(shown[0], shown[1])


def test_the_images_may_be_any_sequence(run):
    listed, other = (frame({"demo": open_run(run)}, 0, kind((0, 1))) for kind in (list, tuple))
    assert np.array_equal(listed, other)


def test_a_film_plays_for_ever_and_holds_its_last_frame(run, tmp_path):
    film(run, "--output", tmp_path / "film")
    with Image.open(tmp_path / "film" / "all.gif") as gif:
        assert gif.info["loop"] == 0
        lengths = []
        for place in range(gif.n_frames):
            gif.seek(place)
            lengths.append(gif.info["duration"])
    assert lengths[-1] > 3 * lengths[0]
    assert lengths[0] == lengths[1] > 0


def test_a_strip_has_a_column_for_each_step_and_a_row_for_each_method(run, tmp_path):
    film(run, "--output", tmp_path / "film")
    picture = np.asarray(Image.open(tmp_path / "film" / "image-2.png"))
    columns, row = 1 + len(STEPS), LINE + TILE_WIDTH + GAP
    assert picture.shape[1] == GAP + columns * (TILE_WIDTH + GAP)
    head = picture.shape[0] - 2 * row - 2 * LINE  # above the legend
    assert head == LINE + GAP + 4 * LINE
    opened = open_run(run)
    for firing in range(len(STEPS)):
        for place, title in enumerate(("attention rollout", "gradient rollout")):
            top, left = head + place * row + LINE, GAP + (1 + firing) * (TILE_WIDTH + GAP)
            tile = Image.fromarray(opened.tiles(firing, 2)[title])
            expected = np.asarray(tile.resize((TILE_WIDTH, TILE_WIDTH), Image.Resampling.BICUBIC))
            assert np.array_equal(picture[top : top + TILE_WIDTH, left : left + TILE_WIDTH], expected)


def test_two_runs_stand_side_by_side_where_their_trainings_are_as_far(run, tmp_path, capsys):
    other = write_run(tmp_path / "logs" / "shortcut", steps=(0, 50, 60, 70, 100))
    runs = {folder.name: open_run(folder) for folder in (run, other)}
    assert timeline(runs.values(), 60) == [0, 0.5, 0.6, 0.7, 1]
    assert timeline(runs.values(), 2) == [0, 1]
    out = tmp_path / "film"
    assert film(run, other, "--output", out) == 0
    assert not capsys.readouterr().err
    shown = frames(out / "all.gif")
    assert len(shown) == 5
    wide = frame({"demo": runs["demo"]}, 0, range(COUNT)).shape[1]
    assert shown[0].shape[1] > 2 * wide
    for picture, firing in zip(shown, (0, 1, 1, 1, 2), strict=True):
        alone = frame({"demo": runs["demo"]}, runs["demo"].position(firing), range(COUNT))
        assert np.abs(picture[: len(alone), :wide].astype(int) - alone).mean() < NEAR / 4
    assert names(out) == sorted(
        ["all.gif", *(f"image-{i}.{kind}" for i in range(COUNT) for kind in ("gif", "png"))]
    )


def test_more_than_four_runs_stand_in_rows(run, tmp_path, capsys):
    others = [write_run(tmp_path / "logs" / name) for name in ("even", "left", "odd", "right")]
    write(tmp_path / "logs" / "killed", "write_facts", {})
    out = tmp_path / "film"
    assert film(tmp_path / "logs", "--output", out) == 1
    assert "logs/killed/vitx holds no maps" in capsys.readouterr().err
    panels = [frame({folder.name: open_run(folder)}, 1, [0]) for folder in (run, *others)]
    shown = frames(out / "image-0.gif")[2]
    high, wide = panels[0].shape[:2]
    assert 2 * high < shown.shape[0] < 3 * high
    assert 4 * wide < shown.shape[1] < 5 * wide
    for panel, (top, left) in zip(
        (panels[0], panels[3], panels[4]), ((0, 0), (0, -wide), (-high, 0)), strict=True
    ):
        seen = np.roll(shown, (-top, -left), (0, 1))[:high, :wide]
        assert np.abs(seen.astype(int) - panel).mean() < NEAR / 4
    strips = np.asarray(Image.open(out / "image-0.png"))
    assert strips.shape[0] > 5 * TILE_WIDTH


def test_runs_with_different_images_are_said(run, tmp_path, capsys):
    fewer = write_run(tmp_path / "logs" / "fewer", count=1)
    assert film(run, fewer, "--output", tmp_path / "film") == 0
    assert not capsys.readouterr().err, "those that both have are the same"
    assert names(tmp_path / "film") == ["image-0.gif", "image-0.png"]
    other = write_run(tmp_path / "logs" / "other", images=pixels()[::-1])
    assert film(run, other, "--output", tmp_path / "film") == 0
    assert "do not watch the same images" in capsys.readouterr().err


def test_few_frames_are_chosen_and_steps_of_other_images_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitx.cli.timelapse._FRAMES", 2)
    monkeypatch.setattr("vitx.cli.timelapse._STILLS", 2)
    run = write_run(tmp_path / "run")
    write_images(run, 12, 255 - pixels())
    for step in (12, 15, 18):
        write_firing(run, step, maps(step), LOGITS)
    assert film(run, "--output", tmp_path / "film") == 0
    assert "run is shown without the first 3 steps, of other images" in capsys.readouterr().err
    assert len(frames(tmp_path / "film" / "all.gif")) == 2
    strip = Image.open(tmp_path / "film" / "image-0.png")
    assert strip.width == GAP + 3 * (TILE_WIDTH + GAP)


def test_one_firing_is_a_film_too(tmp_path):
    run = write_run(tmp_path / "run", steps=(0,))
    assert film(run, "--output", tmp_path / "film") == 0
    assert len(frames(tmp_path / "film" / "all.gif")) == 1


def test_bad_input_is_said_in_a_sentence_and_nothing_is_written(tmp_path, capsys):
    assert film("absent", "--output", tmp_path / "film") == 2
    assert capsys.readouterr().err.startswith("error: there is no folder absent")
    assert not (tmp_path / "film").exists()


def test_the_output_may_not_be_a_file(run, tmp_path, capsys):
    (tmp_path / "film").write_text("in the way")
    assert film(run, "--output", tmp_path / "film") == 2
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / "film").read_text() == "in the way"


def test_the_height_of_wide_pictures_follows(tmp_path):
    write_images(tmp_path, 0, np.zeros((1, 16, 32, 3), np.uint8))
    write_firing(tmp_path, 0, {"rollout": np.ones((1, 2, 4))}, np.zeros((1, 2)))
    assert film(tmp_path, "--output", tmp_path / "film") == 0
    strip = Image.open(tmp_path / "film" / "image-0.png")
    assert (strip.height - 2 * GAP - TILE_WIDTH // 2) % LINE == 0
    assert strip.width == TILE_WIDTH * 2 + 3 * GAP
