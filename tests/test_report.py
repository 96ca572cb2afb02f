"""The report of a training: its contents, and what a browser shows of it."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vitx
from tests import models
from tests.browsers import opened as open_page
from tests.browsers import playwright, shoot
from tests.played_runs import (
    CLASSES,
    COUNT,
    LOGITS,
    SIZE,
    STEPS,
    maps,
    open_run,
    pixels,
    same,
    write_firing,
    write_images,
    write_run,
)
from tests.reports import TITLES, articles, films, picture, report, said
from vitx.pictures import render
from vitx.pictures.captions import captions_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs") / "demo"
    csv = {"name": "CSVLogger", "version": "version_0", "address": "."}
    loggers = [csv, {"name": "WandbRun", "version": "x1", "address": "https://wandb.ai/x1"}]
    settings = {"lr": 1e-3, "model": {"name": "vit_<tiny>"}}
    return write_run(folder, model="vit_<tiny>", settings=settings, loggers=loggers, note="of x")


@pytest.fixture(scope="module")
def path(run):
    assert report(run, "--output", run / "report.html") == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def page(path):
    return path.read_text("utf-8")


def test_the_page_says_what_the_run_was(page, run):
    for words in (
        "vit_&lt;tiny&gt;",
        "3 images at 3 steps, from 0 to 9",
        "<dt>lr</dt><dd>0.001</dd>",
        "<dt>val/accuracy</dt><dd>0.5 at the end</dd>",
        'attention rollout 0.9 <span role="img" aria-label="to">→</span> 0.7</li>',
        "<dt>model.name</dt>",
        "step 9, accuracy 50%",
        "<dd>CSVLogger, version_0; WandbRun, x1</dd>",
        "<dt>logged to</dt><dd>https://wandb.ai/x1</dd>",
        "<dt>note</dt><dd>of x</dd>",
        f"<dt>folder</dt><dd>{run.parent.name}/demo</dd>",
    ):
        assert words in page
    assert "left out" not in page
    assert str(run.parent) not in page, "a path of the machine is on the page"
    assert "<b>dog" not in page, "a class name became markup"


def test_the_page_has_every_picture_of_every_step(page, run):
    playback = open_run(run)
    order = [int(number) for number in re.findall(r'<article id="image-(\d+)"', page)]
    assert order == [2, 1, 0]
    for image, article in zip(order, articles(page), strict=True):
        (beside,), found = said(article), films(article, len(STEPS))
        assert [text for text, _ in beside] == [str(playback.captions(at)[image]) for at in range(len(STEPS))]
        for firing, title in [(firing, title) for firing in range(len(STEPS)) for title in TITLES]:
            shown = playback.tiles(firing, image)
            gray = Image.fromarray(found[title][firing][..., 0]).resize((32, 32), Image.Resampling.BILINEAR)
            heat = render.palette("inferno")[np.asarray(gray)].astype(float)
            mixed = heat * render.OVERLAY_STRENGTH + shown["input"] * (1 - render.OVERLAY_STRENGTH)
            assert np.abs(mixed - shown[title]).mean() < 4


def test_a_map_that_is_nearly_uniform_says_so(tmp_path):
    flat = np.ones((1, 4, 4), np.float32)
    bright = flat.copy()
    bright[0, 0, 0] = 99
    write_images(tmp_path, 0, pixels(1))
    for step, found in enumerate(([bright, flat], [flat, bright])):
        write_firing(tmp_path, step, dict(zip(("rollout", "gae"), found, strict=True)), LOGITS[:1])
    assert report(tmp_path, "--output", tmp_path / "page.html") == 0
    (article,) = articles((tmp_path / "page.html").read_text("utf-8"))
    assert [flat for _, _, *flat in said(article)[0]] == [[1], [0]]
    live, first, last = article.split('<span class="title">input</span>')[1:]
    assert [part.count('class="flat" hidden') for part in (live, first, last)] == [1, 1, 1]
    assert 'class="flat" hidden' in first.split("gae")[0], "at first, the other one is flat"


def test_the_page_has_the_first_and_the_last_grid(page, run):
    playback = open_run(run)
    shown = re.findall(r'<figure>.*?src="([^"]+)"', page)
    assert [
        same(picture(uri), playback.grid(at, range(COUNT))) for uri, at in zip(shown, (0, 2), strict=True)
    ] == [True] * 2


def test_the_page_begins_with_all_maps_at_once(page, run):
    head, _, _ = page.partition("Image by image")
    (uri,) = re.findall(r'<img src="(data:[^"]+)" alt="the mean map at the last step', head)
    assert (picture(uri) == open_run(run).overview()).all()


def test_a_page_to_click_lies_beside_each_image_where_the_run_holds_a_checkpoint(tmp_path, capsys):
    """The pages show the newest checkpoint and the images that were watched."""
    options = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    runs = [write_run(tmp_path / "logs" / name) for name in ("one", "two")]
    naming = ["--model", "deit_tiny_patch16_224", "--model-options", json.dumps(options)]
    for folder in (runs, runs[:1]):
        assert report(*folder, *naming, "--output", tmp_path / "page.html") == 2
    assert "no run holds a checkpoint" in capsys.readouterr().err
    (runs[1] / "checkpoints").mkdir()
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        model = models.spread(timm.create_model("deit_tiny_patch16_224", num_classes=3, **options)).eval()
        torch.save({"state_dict": model.state_dict()}, runs[1] / "checkpoints" / f"{name}.ckpt")
        os.utime(runs[1] / "checkpoints" / f"{name}.ckpt", (seed, seed))
    for folder, places in ((runs[1:], [0] * COUNT), (runs, [1] * COUNT)):
        assert report(*folder, *naming, "--output", tmp_path / "page.html") == 0
        page = (tmp_path / "page.html").read_text("utf-8")
        links = re.findall(r'href="(page-pages/run-(\d)-image-(\d).html)"', page)
        assert [int(run) for _, run, _ in links] == places
        assert sorted(int(image) for *_, image in links) == [*range(COUNT)]
        for link, _, image in links:
            picture = torch.from_numpy(pixels()[int(image)]).movedim(2, 0)  # of one color: crops are alike
            caption = captions_of(vitx.explain(model, picture).logits, class_names=CLASSES)[0]
            told = re.search(r'id="data">(.*?)</script>', (tmp_path / link).read_text("utf-8"), re.DOTALL)
            assert json.loads(told[1])["images"][0]["caption"] == f"predicted: {caption}"
    assert "one holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("told", [{}, {"normalization": None}, {"model": "Classifier"}, {"newer": True}])
def test_a_run_of_a_timm_model_needs_no_name_of_it(told, tmp_path, capsys):
    """The model is recognized by its name, its weights, and its outputs for the images."""
    name, scale = "test_vit", ((0.5,) * 3, (0.25,) * 3)
    images = (torch.from_numpy(pixels()).movedim(3, 1) / 255 - 0.5) / 0.25
    model = models.spread(timm.create_model(name, num_classes=3, img_size=SIZE)).eval()
    facts = {"model": name, "normalization": scale} | told
    newer = facts.pop("newer", False)
    run = write_run(tmp_path / "run", **facts)
    write_firing(run, STEPS[-1], maps(STEPS[-1]), model(images).detach().numpy())
    state = {
        f"net.{key}": value + newer * torch.randn_like(value) for key, value in model.state_dict().items()
    }
    torch.save({"state_dict": state}, run / "last.ckpt")
    assert report(run, "--output", tmp_path / "page.html") == 0
    page, said = (tmp_path / "page.html").read_text("utf-8"), capsys.readouterr().err
    links = re.findall(r'href="(page-pages/run-0-image-\d.html)"', page)
    assert len(links) == (0 if told else COUNT)
    assert all((tmp_path / link).is_file() for link in links)
    assert (tmp_path / "page-pages").exists() == (not told)
    assert ("does not predict what the run predicted at its end: give --model" in said) == newer


def test_the_page_names_no_address_but_that_of_the_logger(page):
    assert re.findall(r"https?://[^<]*", page) == ["https://wandb.ai/x1"]


def test_steps_of_other_images_are_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run")
    write_images(run, 12, 255 - pixels())
    for step in (12, 15):
        write_firing(run, step, maps(step), LOGITS)
    assert report(run, "--output", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "3 images at 2 steps, from 12 to 15" in page
    assert "<dt>left out</dt><dd>the first 3 steps, of other images</dd>" in page


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent"], "there is no folder absent"),
        (["RUN", "--steps", "1"], "--steps must be at least 2, found 1"),
        (["RUN", "--output", "RUN"], "give the name of a file in it"),
    ],
)
def test_bad_input_is_said_in_a_sentence(words, sentence, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert report(*(run if word == "RUN" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert not list(tmp_path.iterdir())


@pytest.fixture
def opened(browser, path):
    with open_page(browser, path) as page:
        yield page


def test_the_slider_moves_the_picture(opened):
    article = opened.locator("article").first
    slider, tiles = article.get_by_role("slider"), article.locator(".live .tile")
    assert slider.get_attribute("aria-valuetext") == "step 9, accuracy 50%"
    seen = {}
    for key, step in ((None, 9), ("ArrowLeft", 4), ("Home", 0), ("End", 9)):
        if key:
            slider.press(key)
        assert article.locator("output").text_content().startswith(f"step {step}")
        assert slider.get_attribute("aria-valuetext").startswith(f"step {step}")
        now = tuple(tile.screenshot() for tile in tiles.all())
        assert seen.setdefault(step, now) == now
    assert len({shot[0] for shot in seen.values()}) == 1, "the input moves"
    assert len(set(seen.values())) == 3
    shoot(opened, "report-wide", full_page=True)


def test_what_the_browser_shows_is_the_overlay(opened, run):
    """The browser alone enlarges and colors the maps, and overlays them on the input."""
    playback = open_run(run)
    tiles = opened.locator("#image-2 .live .tile")
    for tile, title in zip(tiles.all(), ("input", *TITLES), strict=True):
        shot = Image.open(io.BytesIO(tile.screenshot())).convert("RGB").resize((32, 32), Image.Resampling.BOX)
        inside = (slice(1, -1), slice(1, -1))  # the corners are round
        error = np.abs(np.asarray(shot).astype(int) - playback.tiles(2, 2)[title])[inside]
        assert error.mean() < 6, title


def test_one_slider_moves_all_images(opened):
    opened.get_by_role("slider", name="step of all images").press("Home")
    says = [article.locator("output").text_content() for article in opened.locator("article").all()]
    assert says == ["step 0"] * COUNT
    opened.locator("article").first.get_by_role("slider").press("End")
    says = [article.locator("output").text_content() for article in opened.locator("article").all()]
    assert says == ["step 9, accuracy 50%", *["step 0"] * (COUNT - 1)]


def test_it_plays_to_the_end(opened):
    opened.get_by_role("button", name="play").click()
    output, expect = opened.locator(".bar output"), playwright().expect
    assert output.text_content() == "step 0"
    expect(output).to_have_text("step 9, accuracy 50%", timeout=60_000)
    expect(opened.locator("#play")).to_have_attribute("title", "play", timeout=60_000)


def test_captions_are_text(opened):
    said = opened.locator("article").first.locator(".live .caption")
    assert said.text_content() == f"\N{BALLOT X} {CLASSES[1]} 99%, is newt"
    assert said.get_attribute("data-right") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_fits_its_window(width, scheme, opened):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    shoot(opened, f"report-{width}-{scheme}", full_page=True)
    ink, paper = (
        opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
    )
    brighter = sum(map(int, re.findall(r"\d+", ink))) > sum(map(int, re.findall(r"\d+", paper)))
    assert brighter == (scheme == "dark")


def test_it_prints_the_first_and_the_last_step_of_each_image_whole(opened, tmp_path):
    opened.emulate_media(media="print", color_scheme="dark")
    opened.set_viewport_size({"width": 700, "height": 1000})  # a sheet of paper
    assert opened.get_by_role("slider").count() == 0
    for article in opened.locator("article").all():
        shown = article.locator(".still")
        assert [still.locator("p").first.text_content() for still in shown.all()] == [
            "step 0", "step 9, accuracy 50%"
        ]  # fmt: skip
        for tile in shown.locator(".tile").all():
            box = tile.bounding_box()
            assert box["width"] > 50
            assert box["x"] + box["width"] <= 700
    folder = Path(os.environ.get("VITX_SCREENSHOTS", tmp_path))
    pdf = opened.pdf(path=folder / "report.pdf")
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert len(re.findall(rb"/Subtype\s*/Image", pdf)) >= COUNT * 3
    shoot(opened, "report-print", full_page=True)


def test_without_scripts_the_first_and_the_last_step_are_there(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".still").first.is_visible()
    assert not page.get_by_role("slider").count()
    assert page.locator(".still .caption").first.text_content() == f"\N{BALLOT X} {CLASSES[1]} 99%, is newt"
    context.close()
