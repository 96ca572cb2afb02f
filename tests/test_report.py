"""The page about a training: what is in it, and what a browser makes of it."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.played_runs import CLASSES, COUNT, STEPS, same, write_events, write_maps
from vitx import render
from vitx.cli import main
from vitx.cli.curves import charts
from vitx.runs.events import Curve
from vitx.runs.run import open_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


def report(*words):
    return main(["report", *map(str, words)])


def picture(uri):
    """The pixels of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def looks(page):
    """What each slider leads to, in the order of the page."""
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_events(write_maps(tmp_path_factory.mktemp("logs") / "demo"))
    (folder / "hparams.yaml").write_text("model_name: vit_<tiny>\nlr: 1.0e-3\n")
    return folder


@pytest.fixture(scope="module")
def path(run):
    assert report(run, "--output", run / "report.html") == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def page(path):
    return path.read_text("utf-8")


def test_the_page_says_what_the_run_was(page):
    for words in (
        "vit_&lt;tiny&gt;",
        "3 images at 3 steps, from 0 to 9",
        "lr: 1.0e-3",
        "step 9, accuracy 50%",
    ):
        assert words in page
    assert "<b>dog" not in page, "a class name became markup"


def test_the_page_has_every_picture_of_every_step(page, run):
    found, playback = looks(page), open_run(run).playback
    assert [len(of_image) for of_image in found] == [len(STEPS)] * COUNT
    order = [int(number) for number in re.findall(r'<article id="image-(\d+)"', page)]
    assert order == [2, 1, 0]
    for image, of_image in zip(order, found, strict=True):
        for firing, look in enumerate(of_image):
            shown = playback.tiles(firing, image)
            assert look["caption"] == str(playback.caption(firing, image))
            for uri, title in zip(look["pictures"], ("attention rollout", "gradient rollout"), strict=True):
                heat = Image.fromarray(picture(uri)).resize((32, 32), Image.Resampling.BILINEAR)
                mixed = np.asarray(heat) * render.OVERLAY_STRENGTH
                mixed = mixed + shown["input"] * (1 - render.OVERLAY_STRENGTH)
                assert np.abs(mixed - shown[title]).mean() < 4


def test_the_page_has_the_first_and_the_last_grid(page, run):
    playback = open_run(run).playback
    shown = re.findall(r'<figure>.*?src="([^"]+)"', page)
    assert [
        same(picture(uri), playback.grid(at, range(COUNT))) for uri, at in zip(shown, (0, 2), strict=True)
    ] == [True] * 2


def test_the_page_names_no_address(page):
    assert not re.search(r"https?://", page)


def test_without_saved_maps_the_page_shows_what_was_logged(tmp_path):
    run = write_events(tmp_path / "run")
    assert report(run, "--output", tmp_path / "page.html", "--steps", 2) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "save_maps=True" in page
    first, *_ = found = looks(page)
    assert [len(of_image) for of_image in found] == [2] * COUNT
    playback = open_run(run).playback
    assert same(picture(first[0]["strip"]), playback.caption(0, 0))
    error = np.abs(picture(first[0]["pictures"][0]).astype(int) - playback.tiles(0, 0)["attention rollout"])
    assert error.mean() < 4


def test_curves_of_one_measure_share_a_chart():
    curve = Curve((0, 5), (0.25, 0.5))
    tags = ["lr", "epoch", "train/loss", "vitx/rollout/drift", "val/loss", "val/accuracy", "vitx/new/drift"]
    found = charts(dict.fromkeys(tags, curve))
    assert [chart.name for chart in found] == ["accuracy", "loss", "drift", "lr"]
    names = [[line.name for line in chart.lines] for chart in found]
    assert names == [["val"], ["train", "val"], ["attention rollout", "new"], ["lr"]]
    assert (found[0].lines[0].first, found[0].lines[0].last) == ("0.25", "0.5")
    assert found[0].svg.startswith("<svg")
    for line in found[1].lines:
        assert line.colour in found[1].svg


def test_numbers_that_are_none_are_drawn_too():
    (chart,) = charts({"train/loss": Curve((0, 1, 2), (1.0, float("nan"), float("inf")))})
    assert chart.lines[0].last == "inf"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent"], "there is no folder absent"),
        (["RUN", "--steps", "0"], "--steps must be at least 1, found 0"),
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


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip(f"no browser on the PATH: none of {BROWSERS}")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser without playwright: pip install it", exc_type=ImportError
    )
    offline = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with (
        playwright.sync_playwright() as engine,
        engine.chromium.launch(executable_path=CHROMIUM, args=offline) as browser,
    ):
        yield browser


@pytest.fixture
def opened(browser, path):
    """The page in a browser, with what it asks for and what goes wrong in it."""
    with browser.new_page(viewport={"width": 1400, "height": 900}) as page:
        page.asked, page.wrong = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("console", lambda message: page.wrong.append(message.text))
        page.goto(path.as_uri())
        yield page
        fetched = [url for url in page.asked if not url.startswith("data:")]
        assert fetched == [path.as_uri()], "the page fetches something"
        assert not page.wrong


def shoot(page, name, **options):
    """Takes a screenshot, for the eye too."""
    folder = os.environ.get("VITX_SCREENSHOTS")
    return page.screenshot(path=folder and Path(folder) / f"report-{name}.png", **options)


def test_the_slider_moves_the_picture(opened):
    article = opened.locator("article").first
    slider, pictures = article.get_by_role("slider"), article.locator("[data-picture]")
    assert slider.get_attribute("aria-valuetext") == "step 9, accuracy 50%"
    seen = {}
    for key, step in ((None, 9), ("ArrowLeft", 4), ("Home", 0), ("End", 9)):
        if key:
            slider.press(key)
        assert article.locator("output").text_content().startswith(f"step {step}")
        assert slider.get_attribute("aria-valuetext").startswith(f"step {step}")
        assert f"step {step}" in pictures.first.get_attribute("alt")
        now = (pictures.first.get_attribute("src"), article.locator(".live .tiles").screenshot())
        assert seen.setdefault(step, now) == now
    assert len({source for source, _ in seen.values()}) == len({shot for _, shot in seen.values()}) == 3
    shoot(opened, "wide", full_page=True)


def test_captions_are_text(opened):
    said = opened.locator("article").first.locator("[data-caption]")
    assert said.text_content() == f"\N{BALLOT X} {CLASSES[1]} 99%, is newt"
    assert said.get_attribute("data-right") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_fits_its_window(width, scheme, opened):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    shoot(opened, f"{width}-{scheme}", full_page=True)
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
        for image in shown.locator("img").all():
            box = image.bounding_box()
            assert box["width"] > 50
            assert box["x"] + box["width"] <= 700
    folder = Path(os.environ.get("VITX_SCREENSHOTS", tmp_path))
    pdf = opened.pdf(path=folder / "report.pdf")
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert len(re.findall(rb"/Subtype\s*/Image", pdf)) >= COUNT * 3
    shoot(opened, "print", full_page=True)


def test_without_scripts_the_first_and_the_last_step_are_there(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".still").first.is_visible()
    assert not page.get_by_role("slider").first.is_visible()
    context.close()
