"""What a watch says: once, and where it is heard."""

import logging
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vitx.attribution import title_of
from vitx.pictures.colors import Colors
from vitx.watch.explaining import Explainer
from vitx.watch.images import Samples

_log = logging.getLogger("vitx")


def warn(sentence: str) -> None:
    """Warns; through the logger, which ends at stderr, where a project silences warnings."""
    if silenced(sentence):
        _log.warning(sentence)
    else:
        warnings.warn(sentence, stacklevel=2)


def inform(sentence: str) -> None:
    """Says what went well: through the logger where someone listens to it, else to stderr."""
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info(sentence)
    else:
        print(sentence, file=sys.stderr)


def silenced(sentence: str) -> bool:
    """Whether the filters of `warnings` ignore it; those of a module or a line are none of ours."""
    for action, message, category, module, line in warnings.filters:
        about_us = issubclass(UserWarning, category) and not (module or line)
        if about_us and (message is None or re.match(message, sentence)):
            return action == "ignore"
    return False


def path_of(path: str | Path) -> str:
    """Returns a path as short as it can be said here: relative, if it is below the working folder."""
    whole, here = Path(path).absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)


def first_words(
    samples: Samples,
    explainer: Explainer,
    colors: Colors,
    names: Sequence[str] | None,
    hints: Sequence[str],
    kept: Path | None,
    places: Sequence[str],
) -> str:
    """Says what was found and how, what is missing, and where pictures are."""
    if samples.out_of is not None:
        images = f"{len(samples)} of {samples.out_of:,} images"
    elif samples.stream:
        images = f"the first {len(samples)} images"
    else:
        images = f"{len(samples)} images"
    of = f" of {samples.source}" if samples.source else ""
    if samples.stream:
        of += " (a stream, so no others can be chosen)"
    shown = ", ".join(title_of(name) for name in explainer.explained)
    known = ""
    if explainer.of_classes:
        known = f"{len(names)} names of classes" if names else "no names of classes"
    where = f"pictures in {', '.join(places)}" if places else "no pictures"
    if kept is not None:
        where += f", maps in {path_of(kept)}"
    how = "; ".join(filter(None, (str(colors), *samples.found, known, where, *hints)))
    return f"watches {images}{of} by {shown}: {how}"
