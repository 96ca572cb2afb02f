"""What the pages of `vitx report` hold."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from vitx.cli import main
from vitx.cli.report_page import columns_of

TITLES = ("attention rollout", "gradient rollout")


def report(*words):
    return main(["report", *map(str, words)])


def picture(uri):
    """Return the pixels of a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


def articles(page):
    """Return the part of the page about each image, in the order of the page."""
    return re.findall(r"<article.*?</article>", page, re.DOTALL)


def said(article):
    """Return the caption data of each frame, for each run."""
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', article)[1])


def films(article, count):
    """Return the frames of each film in an article: title -> (count, h, w, 3)."""
    found = {}
    pattern = r'--w: (\d+); --h: (\d+).*?class="film" src="([^"]+)" alt="([^"]+)"'
    for width, height, uri, title in re.findall(pattern, article):
        sheet, width, height = picture(uri), int(width) + 2, int(height) + 2  # with its border
        tops = [(at // columns_of(count) * height, at % columns_of(count) * width) for at in range(count)]
        frames = [sheet[y + 1 : y + height - 1, x + 1 : x + width - 1] for y, x in tops]
        found.setdefault(title.partition(" of image")[0], np.stack(frames))
    return found
