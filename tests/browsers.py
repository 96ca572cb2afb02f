"""The browser in which tests open pages, cut off from the network."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
WITHOUT = f"no browser on the PATH: none of {NAMES}"
OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def playwright():
    """Return Playwright's synchronous API; skip the test if Playwright is not installed."""
    return pytest.importorskip(
        "playwright.sync_api", reason="no browser without playwright: pip install it", exc_type=ImportError
    )


@contextmanager
def opened(browser, path, **options):
    """Open a file in the browser, which must request nothing else and log neither errors nor messages."""
    with browser.new_page(**{"viewport": {"width": 1400, "height": 900}} | options) as page:
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(path.as_uri())
        yield page
        fetched = [url for url in asked if not url.startswith("data:")]
        assert fetched == [path.as_uri()], "the page fetches something"
        assert not wrong


def shoot(page, name, **options):
    """Save a screenshot for inspection if VITX_SCREENSHOTS names a folder."""
    if folder := os.environ.get("VITX_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", **options)
