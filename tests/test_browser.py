"""A training as a user sees it: logged, read by the real TensorBoard, shown in a real browser."""

import base64
import io
import re
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from tests import browsers, run_folders
from tests.lightning_models import IMAGE, SmallClassifier, fit
from vitx.callbacks import RolloutCallback

playwright = browsers.playwright()
pytestmark = pytest.mark.skipif(browsers.CHROMIUM is None, reason=browsers.WITHOUT)

PATIENCE = 60  # seconds; far more than needed, since busy machines are slow
# Returns the picture that an <img> shows, as a PNG; null while it loads.
SHOWN = """image => {
    if (!image.complete || !image.naturalWidth) return null;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL().split(",")[1];
}"""


class QuickLearner(SmallClassifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def squares(count):
    """Return images of a bright square each, whose place and color show the class, with labels and masks."""
    images = torch.full((count, 3, IMAGE, IMAGE), 0.15)
    masks = torch.zeros(count, IMAGE, IMAGE, dtype=torch.bool)
    half = IMAGE // 2
    for index in range(count):
        label = index % 3
        top, left = [(0, 0), (0, half), (half, half // 2)][label]
        images[index, label, top : top + half, left : left + half] = 0.9
        masks[index, top : top + half, left : left + half] = True
    return TensorDataset(images, torch.arange(count) % 3, masks)


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)
    return found


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Return a folder that holds the logs of a training and nothing else."""
    folder = tmp_path_factory.mktemp("logs")
    data = DataLoader(squares(24), batch_size=6, shuffle=True), DataLoader(squares(12), batch_size=6)
    logger = TensorBoardLogger(folder, name=None, version="training")
    callback = RolloutCallback(num_images=3, every_n_steps=4, on_error="raise")
    fit(callback, module=QuickLearner, data=data, logger=logger, max_epochs=3)
    return folder


@pytest.fixture(scope="module")
def logged(logs):
    """Return the pictures in the event file as {step: pixels}."""
    reader = run_folders.events(logs / "training")
    return {event.step: pixels(event.encoded_image_string) for event in reader.Images("vitx/maps")}


@pytest.fixture(scope="module")
def tensorboard(logs, tmp_path_factory):
    """Yield the address of a TensorBoard that serves the logs."""
    said = tmp_path_factory.mktemp("tensorboard") / "stderr.txt"
    options = ["--logdir", logs, "--host", "127.0.0.1", "--port", "0", "--samples_per_plugin", "images=100"]
    with said.open("w") as stderr:
        process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stderr=stderr)
    try:
        address = partial(re.search, r"http://127\S+/")
        wait_for(lambda: process.poll() is not None or address(said.read_text()), "TensorBoard to start")
        if process.poll() is not None:
            pytest.skip(f"TensorBoard does not start: {said.read_text()[-500:]}")
        yield address(said.read_text())[0]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def page(tensorboard, logged, browser):
    """Yield an empty page once TensorBoard has read everything that was logged."""
    playwright.expect.set_options(timeout=PATIENCE * 1000)
    with browser.new_page(base_url=tensorboard, viewport={"width": 1280, "height": 900}) as page:
        page.set_default_timeout(PATIENCE * 1000)
        query = "data/plugin/images/images?run=training&tag=vitx/maps&sample=0"

        def read():
            answer = page.request.get(query)
            return answer.ok and {image["step"] for image in answer.json()} == set(logged)

        wait_for(read, "TensorBoard to read the logs")
        yield page


def show_only(page, tags):
    """Filter the cards: the page does not load those that are far down or in a folded group."""
    field = page.get_by_role("combobox", name="Filter tags")
    field.fill(tags)
    field.press("Escape")  # closes the suggestions, which cover the cards


def has_color(chart):
    """Return True if a curve is drawn; the grid is gray."""
    return np.ptp(pixels(chart.screenshot()), -1).max() > 20


def assert_plays_back(page, card, logged, name):
    """Assert that the slider starts at the last step and shows the logged picture of each step."""
    image, steps = card.locator("img"), sorted(logged)

    def shows(step):
        png = image.evaluate(SHOWN)
        return png and np.array_equal(pixels(base64.b64decode(png)), logged[step])

    for key, step in ((None, steps[-1]), ("ArrowLeft", steps[-2]), ("Home", steps[0])):
        if key:
            card.get_by_role("slider").press(key)
        playwright.expect(card).to_contain_text(re.compile(rf"step\s+{step}\b", re.IGNORECASE))
        wait_for(partial(shows, step), f"the picture of step {step}")
        browsers.shoot(page, f"{name}-step-{step}")


def test_the_logged_pictures_differ_visibly(logged):
    assert sorted(logged) == [0, 3, 7, 11]
    first, *later = (picture.astype(int) for _, picture in sorted(logged.items()))
    assert first.shape[1] == 350, "the card is so wide, and scales what is not, which garbles the text"
    assert all(np.abs(picture - first).mean() > 3 for picture in later)


def test_the_images_page_plays_the_training_back(page, logged):
    page.goto("#images")
    card = page.locator("tf-image-loader", has_text="vitx/maps")
    assert_plays_back(page, card, logged, "images")


def test_the_time_series_page_plays_the_training_back_beside_the_scalars(page, logged):
    page.goto("#timeseries")
    playwright.expect(page.locator("metrics-card-group-toolbar", has_text="vitx")).to_be_attached()
    browsers.shoot(page, "time-series")
    show_only(page, "^vitx/maps$")
    card = page.locator("image-card", has_text="vitx/maps").filter(visible=True)
    assert_plays_back(page, card, logged, "time-series")
    show_only(page, "^vitx/.*/entropy$")
    for method in ("rollout", "grad_rollout"):
        card = page.locator("scalar-card", has_text=f"vitx/{method}/entropy").filter(visible=True)
        playwright.expect(card).to_contain_text("training")  # the run, in the table below the chart
        wait_for(partial(has_color, card.locator(".series-view")), f"the curve of {method}")
    browsers.shoot(page, "time-series-entropy")
