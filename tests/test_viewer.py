"""The interactive page in a real browser: it draws the numbers of `trace.attentions()`."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

import vitx
from tests import models
from tests.browsers import opened, shoot
from tests.test_clips import KINDS
from tests.test_lattice import MERGED, Little, flat
from tests.test_sinks_of_attention import planted
from vitx import VitxError

CLIP = KINDS["VideoMAE"]
# The colors of the large picture at some places, with x and y in [0, 1].
PIXELS = """places => {
    const { width, height } = document.getElementById("stage");
    const { data } = document.getElementById("stage").getContext("2d").getImageData(0, 0, width, height);
    const starts = places.map(([x, y]) => 4 * (Math.floor(y * height) * width + Math.floor(x * width)));
    return starts.map(start => [...data.slice(start, start + 3)]);
}"""


def attentions(model, images):
    with torch.no_grad(), vitx.capture(model.eval()) as trace:
        model(images)
    return trace


def close(found, numbers):
    """Assert that a page draws numbers, divided by the largest one, within one step of a color."""
    numbers = np.asarray(numbers, float).ravel()
    np.testing.assert_allclose(found, numbers / numbers.max(), rtol=0, atol=1 / 255)


@pytest.fixture
def show(browser, tmp_path):
    """Return a function that opens the page of an explanation, and returns it with a reader of its values."""
    opening = []

    def page_of(explanation, **options):
        path = tmp_path / "map.html"
        explanation.save(path)
        opening.append(opened(browser, path, **options))
        page = opening[-1].__enter__()

        def values(**selected):
            return page.evaluate("asked => { vitx.select(asked); return vitx.values(); }", selected)

        return page, values

    yield page_of
    for one in opening:
        one.__exit__(None, None, None)


NAMES = ("deit", "dinov2 with registers", "relative position", "distilled deit", "not square")
PLAIN = {name: models.FAMILIES[name] for name in NAMES}
PLAIN["many patches"] = models.Family(lambda: models.deit(patch_size=4), 1, "token", (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_rows_and_columns_are_those_of_a(show, name):
    known = PLAIN[name]
    model, images, prefix = known.build(), known.images(), known.prefix
    attended = attentions(model, images).attentions()
    _, values = show(vitx.explain(model, images, "rollout"))
    for image, layer, head, (row, column) in ((1, 2, None, (1, 2)), (0, 0, 2, (2, 0)), (1, 1, 0, (0, 0))):
        weights = attended[layer][image]
        weights = weights.mean(0) if head is None else weights[head]
        token = prefix + row * known.grid[1] + column
        at = {"image": image, "layer": layer, "head": head, "token": [row, column]}
        close(values(**at), weights[token, prefix:])
        close(values(**at, show="to"), weights[prefix:, token])
        for number in range(prefix):  # the class token first, then registers
            close(values(**at | {"token": number - 1 if number else "class"}), weights[number, prefix:])


@pytest.mark.slow
def test_a_shifted_window_lies_where_its_patches_are(show):
    model = models.timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, patch_size=2, num_classes=7,
        embed_dim=24, depths=(2, 2), num_heads=(2, 4),
    )  # fmt: skip
    images = models.spread(model).eval() and torch.randn(1, 3, 32, 32)
    weights = [one.weights.matrix() for one in attentions(model, images).self_attentions]
    page, values = show(vitx.explain(model, images, "rollout"))
    for layer, side, shift, (row, column) in ((1, 16, 2, (15, 3)), (0, 16, 0, (5, 6)), (2, 8, 0, (7, 1))):
        grid = torch.arange(side * side).view(side, side).roll((-shift, -shift), (0, 1))
        windows = grid.view(side // 4, 4, side // 4, 4).transpose(1, 2).reshape(-1, 16)
        window, place = (windows == row * side + column).nonzero()[0].tolist()
        for head in (1, None):
            a = weights[layer][window]
            a = a.mean(0) if head is None else a[head]
            wanted = torch.zeros(side * side)
            wanted[windows[window]] = a[place]
            at = {"layer": layer, "head": head, "token": [row, column]}
            close(values(**at), wanted)
            assert page.locator("#said").inner_text().endswith("It looks only inside its window.")
            wanted[windows[window]] = a[:, place]
            close(values(**at, show="to"), wanted)


@pytest.mark.slow
def test_a_clip_is_shown_frame_by_frame(show):
    build, shape, grid = CLIP
    model, clips = build().eval(), torch.randn(shape)
    weights = attentions(model, clips).attentions()[1][1, 1]
    _, values = show(vitx.explain(model, clips, "rollout"))
    row = weights[np.ravel_multi_index((1, 0, 1), grid)]
    close(values(image=1, layer=1, head=1, token=[0, 1], frame=1), row)
    close(values(token=[1, 0, 1]), row)
    close(values(token=[1, 0]), weights[2])


@pytest.mark.slow
def test_maps_of_methods_and_classes(show):
    model, images = models.built("deit"), models.FAMILIES["deit"].images()
    found = vitx.explain(model, images, "evidence", target=[3, 5])
    page, values = show(found)
    assert page.locator("#caption").inner_text().startswith("predicted: ")
    close(values(method="evidence", image=1), found.maps[1])
    close(values(method="evidence", signed=True), found.signed[1])
    others = [c for c in found.logits[1].argsort(descending=True).tolist() if c != 5]
    other = vitx.explain(model, images[1:], "grad_rollout", target=others[0])
    close(values(method="grad_rollout", target=1), other.maps)
    assert [one.split(" (")[0] for one in page.locator("#target option").all_inner_texts()] == [
        f"class {number}" for number in (5, *others[:2])
    ]


@pytest.mark.slow
def test_keyboard_mouse_and_words(show):
    model, images = models.built("dinov2 with registers"), models.FAMILIES["deit"].images(1)
    page, values = show(
        vitx.explain(model, images), viewport={"width": 390, "height": 844}, color_scheme="dark"
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#tokens button").all_inner_texts() == [
        "class token", *(f"register {number}" for number in range(4))
    ]  # fmt: skip
    stage, said = page.locator("#stage"), page.locator("#said")
    for key in ("Tab",) * 9:
        page.keyboard.press(key)
        if stage.evaluate("one => one === document.activeElement"):
            break
    ring = stage.evaluate("one => getComputedStyle(one).outlineStyle")
    assert ring == "solid"
    page.keyboard.press("ArrowRight")
    assert "the patch in row 2, column 2 looks most at" in said.inner_text()
    page.keyboard.press("ArrowDown")
    assert "the patch in row 3, column 2" in said.inner_text()
    box = stage.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    assert "the patch in row 0, column 3 looks most at" in said.inner_text()
    assert "row 0, column 3: " in page.locator("#hover").inner_text()
    page.get_by_role("button", name="who looks at the patch").click()
    assert "row 0, column 3 is looked at most by" in said.inner_text()
    page.get_by_role("button", name="register 2").click()
    assert "the register 2 is looked at" in said.inner_text()
    page.locator("#layer").press("ArrowLeft")
    assert said.inner_text().startswith("Layer 1, mean")
    shoot(page, "viewer-390", full_page=True)
    with pytest.raises(Exception, match="layer 3: there are layers 0 to 2"):
        values(layer=3)


@pytest.mark.slow
def test_sinks_have_rings(show):
    images, (sink, patch) = torch.rand(1, 3, 64, 64), ((0, 5), (5, 2))
    page, values = show(vitx.explain(planted(64, [5, 40]), images))
    assert "Rings: patches that most others attend to (possible sinks)" in page.locator("#rings").inner_text()
    values(token=sink)
    assert "the patch in row 0, column 5 (a sink) looks most at" in page.locator("#said").inner_text()
    values(token=(7, 7))
    edges = [[column / 8, (row + 0.5) / 8] for row, column in ((*sink,), (*patch,))]
    colors = page.evaluate(PIXELS, edges)
    assert colors[0] == [0, 179, 164] != colors[1]
    assert not show(vitx.explain(planted(64, []), images))[0].locator("#rings").is_visible()


def test_tokens_without_a_grid_are_refused():
    parts = MERGED["in the same place"]
    model = Little(lambda self, grid: torch.stack([flat(grid)[:, part].mean(1) for part in parts], 1))
    with pytest.raises(VitxError, match="no layer has tokens that lie in a grid of the picture"):
        vitx.explain(model, torch.randn(1, 3, 16, 16)).view()


def test_single_logits_have_a_class_and_no_probability():
    model = torch.nn.Sequential(models.deit(num_classes=1), torch.nn.Flatten(0))
    found = vitx.explain(model, models.FAMILIES["deit"].images(2), "evidence")
    assert found.logits.shape == (2,)
    html = found.view().html
    assert all(f'"targets": ["class {cls}"]' in html for cls in found.target)


def test_a_page_leaves_no_trace():
    """The explanation keeps neither the model nor its attention, and can be pickled and copied."""
    model = models.deit()
    images = models.FAMILIES["deit"].images(1)
    found = vitx.explain(model, images)
    html = found.view()._repr_html_()
    assert html.startswith("<iframe srcdoc=")
    assert model.training
    assert torch.equal(pickle.loads(pickle.dumps(found)).maps, found.maps)
    for lost in (copy.deepcopy(found), found.without_images()):
        with pytest.raises(VitxError, match="a page needs the model and the images"):
            lost.view()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    with pytest.raises(VitxError, match="outputs of the model have changed since it was explained"):
        found.view()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    with pytest.raises(VitxError, match="the model that was explained is gone"):
        found.view()
