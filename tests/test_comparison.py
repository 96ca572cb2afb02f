"""The page that compares trainings: its contents, and how a browser shows it."""

import json
import re
from html import unescape

import numpy as np
import pytest

from tests.browsers import opened as open_page
from tests.browsers import shoot
from tests.played_runs import (
    COUNT,
    LOGITS,
    STEPS,
    maps,
    open_run,
    pixels,
    write,
    write_firing,
    write_images,
    write_run,
)
from tests.reports import articles, films, picture, report, said


def write_one(folder, rate, accuracy, depth=4, **options):
    model = {"class_path": "my.Model", "learning_rate": rate, "depth": depth, "names": ["a", "b"]}
    logger = {"init_args": {"name": folder.name}}
    settings = {"trainer": {"logger": logger, "max_epochs": 3}, "model": model, "learning_rate": rate}
    return write_run(folder, accuracy=accuracy, settings=settings, model="vit", **options)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Write three runs that watch the same images, one of them at fewer steps, and one with other images."""
    folder = tmp_path_factory.mktemp("logs")
    write_one(folder / "slow", 1e-4, 0.5)
    write_one(folder / "<b>fast", 1e-3, 0.75, depth=None)
    write_one(folder / "half", 1e-3, 0.25, steps=(0, 40))
    write_one(folder / "other", 1e-3, 0.25, images=255 - pixels())
    return folder


@pytest.fixture(scope="module")
def path(logs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert report(logs, "--output", path) == 0
    return path


@pytest.fixture(scope="module")
def page(path):
    return path.read_text("utf-8")


@pytest.fixture
def opened(browser, path):
    with open_page(browser, path) as page:
        yield page


def rows(page):
    """Return the rows of the table, each as {heading: cell}."""
    headings = re.findall(r"<button type=\"button\">(.*?)</button></th>", page)
    found = []
    for row in re.findall(r"<tr class=\"run-\d+\".*?</tr>", page, re.DOTALL):
        cells = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)]
        found.append(dict(zip(headings, cells, strict=True)))
    return found


def test_the_table_has_what_differs_and_what_came_out(page):
    found = rows(page)
    names = ["&lt;b&gt;fast", "half", "other", "slow"]
    assert [row["run"] for row in found] == names, "a name became markup, or the order is not theirs"
    assert [row["learning_rate"] for row in found] == ["0.001", "0.001", "0.001", "0.0001"]
    assert [row["depth"] for row in found] == ["none", "4", "4", "4"]
    assert [row["accuracy"] for row in found] == ["0.75", "0.25", "0.25", "0.5"]
    assert [row["steps"] for row in found] == ["9", "40", "9", "9"]
    assert not {"max_epochs", "model.learning_rate"} & set(found[0])
    assert "name" not in found[0], "where a run lies is no setting"
    assert re.search(r"<dt>vitx.model</dt><dd>vit</dd>", page)
    assert re.search(r"<dt>trainer.max_epochs</dt><dd>3</dd>", page)


def test_what_is_the_same_stands_together_and_what_is_not_apart(page):
    assert "in 2 parts" in page
    first, second = re.findall(r'<h3 class="group-name">(.*?)</h3>', page)
    assert first == "What &lt;b&gt;fast, half and slow watch"
    assert second == "What only other watches: other images"
    shown = articles(page)
    assert [len(re.findall(r'class="cell shown', article)) for article in shown] == [3] * COUNT + [1] * COUNT


def test_all_maps_of_each_run_stand_at_once_at_the_head(page, logs):
    head, _, _ = page.partition("The same images under each run</h2>")
    shown = re.findall(r'<img src="([^"]+)" alt="all maps of (.*?) at once">', head)
    assert [unescape(name) for _, name in shown] == ["<b>fast", "half", "other", "slow"]
    for uri, name in shown:
        drawn = open_run(logs / unescape(name)).overview()
        assert np.abs(picture(uri).astype(int) - drawn).mean() < 3


def test_the_slider_goes_by_the_share_of_the_training(page, logs):
    moments = json.loads(re.search(r'id="moments">(.*?)</script>', page)[1])
    assert moments["moments"] == ["the start", "50% of the training", "the end"]
    fast, slow, *_ = moments["headings"]
    assert [heading.partition(",")[0] for heading in fast] == ["step 0", "step 4", "step 9"]
    assert [heading.partition(",")[0] for heading in slow] == ["step 0", "step 0", "step 40"]
    half = open_run(logs / "half")
    for article in articles(page)[:COUNT]:
        image = int(re.search(r"Image (\d)", article)[1])
        assert [text for text, *_ in said(article)[1]] == [str(half.captions(1)[image])] * 3
        cell = article.split('class="cell shown')[2]
        frames = films(cell, 3)["attention rollout"][..., 0]
        expected = maps(0)["rollout"][image], maps(40)["rollout"][image]
        assert [int(frame.argmax()) for frame in frames] == [int(expected[k].argmax()) for k in (0, 0, 1)]


def test_maps_of_one_method_stand_in_one_row(tmp_path):
    write_run(tmp_path / "logs" / "a")
    other = write_run(tmp_path / "logs" / "b")
    for step in STEPS:
        found = maps(step)
        found["grad_rollout"][1] = 1  # a constant map
        write_firing(other, step, dict(reversed(found.items())), LOGITS)
    assert report(tmp_path / "logs", "--output", tmp_path / "page.html") == 0
    for article in articles((tmp_path / "page.html").read_text("utf-8")):
        titles = re.findall(r'<span class="title">(\w+ rollout)', article)
        assert titles == ["attention rollout", "gradient rollout"] * 2
        image = int(re.search(r"Image (\d)", article)[1])
        assert said(article)[1][-1][2:] == ([1] if image == 1 else [])


def test_the_image_that_runs_disagree_about_comes_first(tmp_path):
    write_run(tmp_path / "logs" / "a")
    logits = LOGITS.copy()
    logits[2] = np.roll(logits[2], 1)
    write_firing(write_run(tmp_path / "logs" / "b"), 9, maps(9), logits)
    assert report(tmp_path / "logs", "--output", tmp_path / "page.html") == 0
    shown = articles((tmp_path / "page.html").read_text("utf-8"))
    assert [int(re.search(r"Image (\d)", article)[1]) for article in shown] == [2, 0, 1]


def test_runs_that_cannot_be_read_are_named_without_paths_of_the_machine(tmp_path, capsys):
    logs = tmp_path / "logs"
    write_one(logs / "one", 1e-3, 0.5)
    write_images(write_one(logs / "two", 1e-3, 0.5), 12, 255 - pixels())
    write_firing(logs / "two", 12, maps(12), LOGITS)
    (write_one(logs / "broken", 1e-3, 0.5) / "vitx" / "images-000000.npz").write_bytes(b"")
    write(logs / "killed", "write_facts", {})
    (logs / "old" / "vitx").mkdir(parents=True)
    np.savez(logs / "old" / "vitx" / "maps-000004.npz", rollout=maps(4)["rollout"])
    assert report(logs, "--output", tmp_path / "page.html") == 1
    page = (tmp_path / "page.html").read_text("utf-8")
    assert [row["run"] for row in rows(page)] == ["one", "two"]
    assert "two is shown without the first 3 steps, of other images." in page
    said = capsys.readouterr().err
    for reason in (
        r"broken(: | \()cannot read \S*logs/broken/vitx/images-000000.npz",
        r"killed(: | \()\S*logs/killed/vitx holds no maps",
        r"old(: | \()\S*logs/old/vitx is of vitx 0.2",
    ):
        assert re.search(reason, page)
        assert re.search(rf"left out {reason}", said)
    assert str(tmp_path) not in page + said


def test_only_some_runs_are_asked_for(logs, tmp_path):
    assert report(logs / "slow", logs / "half", "--output", tmp_path / "page.html") == 0
    assert [row["run"] for row in rows((tmp_path / "page.html").read_text("utf-8"))] == ["half", "slow"]


def test_where_none_can_be_read_nothing_is_written(tmp_path, capsys):
    for name in "ab":
        write(tmp_path / "logs" / name, "write_facts", {})
    assert report(tmp_path / "logs", "--output", tmp_path / "page.html") == 2
    assert "holds no maps" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_where_there_is_much_the_slider_has_fewer_places(tmp_path, monkeypatch):
    for name in "ab":
        write_run(tmp_path / "logs" / name, steps=range(12))
    assert report(tmp_path / "logs", "--output", tmp_path / "all.html") == 0
    whole = (tmp_path / "all.html").read_text("utf-8")
    assert "has 12 places" not in whole
    films_of_it = sum(map(len, re.findall(r'class="film" src="(.*?)"', whole)))
    limit = len(whole.encode()) - films_of_it // 2
    monkeypatch.setattr("vitx.cli.report._MOST_BYTES", limit)
    assert report(tmp_path / "logs", "--output", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert len(page.encode()) <= limit
    places = int(re.search(r"it has (\d+) places, not 12", page)[1])
    assert 2 <= places < 12
    assert len(films(articles(page)[0], places)) == 2


def test_one_slider_moves_all_runs(opened):
    cells = opened.locator("article").first.locator(".cell.shown")
    slider = opened.get_by_role("slider")
    assert slider.count() == 1
    before = [cell.screenshot() for cell in cells.all()]
    slider.press("Home")
    assert opened.locator(".bar output").text_content() == "the start"
    assert cells.locator(".heading").all_text_contents() == ["step 0"] * 3
    assert all(cell.screenshot() != shot for cell, shot in zip(cells.all(), before, strict=True))
    slider.press("ArrowRight")
    assert cells.locator(".heading").all_text_contents() == [
        "step 4, accuracy 75%",
        "step 0",
        "step 4, accuracy 50%",
    ]
    shoot(opened, "comparison-wide", full_page=True)


def test_a_click_sorts_the_table_and_the_pictures(opened):
    def order():
        boxes = {cell.locator(".name").text_content(): cell.bounding_box()["x"] for cell in cells.all()}
        return sorted(boxes, key=boxes.get)

    cells = opened.locator("article").first.locator(".cell.shown")
    table, heading = opened.locator("tbody"), opened.get_by_role("columnheader", name="accuracy")
    assert order() == ["<b>fast", "half", "slow"]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert table.locator("td.run").all_text_contents() == ["half", "other", "slow", "<b>fast"]
    assert order() == ["half", "slow", "<b>fast"]
    heading.get_by_role("button").click()
    assert table.locator("td.run").all_text_contents() == ["<b>fast", "slow", "half", "other"]
    opened.get_by_role("columnheader", name="depth").get_by_role("button").click()
    assert table.locator("td.run").all_text_contents()[-1] == "<b>fast", "words come after numbers"


def test_runs_are_hidden_and_stand_out(opened):
    cell, curve = opened.locator(".cell.run-1").first, opened.locator(".curve.run-1").first
    opened.get_by_role("checkbox", name="show half").uncheck()
    assert not cell.is_visible()
    assert not curve.is_visible()
    assert opened.locator("tbody tr").nth(1).is_visible()
    opened.get_by_role("checkbox", name="show all runs").uncheck()
    assert not opened.locator(".cell.shown").first.is_visible()
    opened.get_by_role("checkbox", name="show all runs").check()
    assert cell.is_visible()
    opened.locator(".legend .run-1").hover()
    assert "focus-1" in opened.locator("html").get_attribute("class")


def boxes(page, parts):
    return page.locator(parts).evaluate_all("parts => parts.map(part => part.getBoundingClientRect())")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_fits_its_window(width, scheme, opened):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert min(box["width"] for box in boxes(opened, ".cell .tile")) > 90
    shoot(opened, f"comparison-{width}-{scheme}", full_page=True)


def test_it_prints_the_moment_that_is_shown(opened, tmp_path):
    opened.get_by_role("slider").press("Home")
    opened.emulate_media(media="print")
    opened.set_viewport_size({"width": 1000, "height": 700})  # like a sheet of paper
    assert opened.get_by_role("slider").count() == 0
    assert "The maps are those at the start." in opened.locator("body").inner_text()
    assert max(box["right"] for box in boxes(opened, "td, .cell .tile")) <= 1000
    drawn = opened.evaluate("""() => {
        dispatchEvent(new Event("beforeprint"));
        const count = document.querySelectorAll("canvas").length;
        dispatchEvent(new Event("afterprint"));
        return [count, document.querySelectorAll("canvas").length];
    }""")
    assert drawn == [(3 + 1) * COUNT * 2, 0], "maps are not drawn large for paper, or are so for ever"
    assert opened.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")


def test_without_scripts_the_end_is_there(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    cell = page.locator(".cell.run-3").first
    assert cell.locator(".heading").text_content() == "step 9, accuracy 50%"
    assert cell.locator(".caption").text_content()
    assert not page.get_by_role("slider").count()
    context.close()
