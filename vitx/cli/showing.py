"""What shows a user what `vitx explain` wrote: a page to click, a link, and what opens it."""

import os
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitx.cli.formatting import add
from vitx.cli.many import Explainer
from vitx.cli.output import Output

PAGE = "map.html"
MOST = 8  # pictures on a page


def add_showing(group: Any) -> None:
    """Adds the options."""
    html = f"also write {PAGE}, a page to click: which patch looks where (of the first {MOST} pictures)"
    add(group, "--html", "", html)
    add(group, "--open", "", "show what was written in the browser: the page, the picture, or the folder")


def tell(file: Path, said: str, paths: Sequence[Path]) -> None:
    """Says what was found in a picture, and where it is written."""
    print(f"{file}: {said}, see {linked(paths[-1])}" if paths else f"{file}: {said}")


def say_done(done: int, errors: Mapping[int, str], folder: Path) -> None:
    """Says how many pictures were explained, and where all is."""
    skipped = f", {len(errors):,} skipped" if errors else ""
    print(f"{done:,} picture{'' if done == 1 else 's'} explained{skipped}: see {linked(folder)}")


def show(options: Any, explainer: Explainer, files: Sequence[Path], output: Output) -> None:
    """Writes the page of the pictures that could be read, and opens what was made, where that is asked for.

    Raises:
        VitxError: As for `Explanation.view`.
    """
    pictures = [path for file in files for path in output.paths(file)]
    made = pictures[0] if len(pictures) == 1 else output.folder
    if options.html:
        made = output.folder / PAGE
        _write_page(explainer, files, made, options.max_pixels)
        print(f"a page to click: see {linked(made)}")
    if options.open and not webbrowser.open(made.resolve().as_uri()):
        print(f"no browser was found that could show {made}", file=sys.stderr)


def _write_page(explainer: Explainer, files: Sequence[Path], path: Path, most_pixels: int | None) -> None:
    """Writes a page of the first pictures."""
    subject = explainer.subject
    some = files[: 1 if subject.prepare.keep_aspect else MOST]  # of one size
    images = torch.stack([subject.prepare(subject.prepare.read(file, most_pixels)) for file in some])
    images = images.to(next(subject.model.parameters(), images))
    explainer.first(images).view(subject.short_names).save(path)


def linked(path: Path) -> str:
    """Returns a path as a terminal shows a link to it; elsewhere as it is."""
    if not sys.stdout.isatty() or os.environ.get("TERM") in (None, "dumb"):
        return str(path)
    return f"\033]8;;{path.resolve().as_uri()}\033\\{path}\033]8;;\033\\"
