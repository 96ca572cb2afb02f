"""Messages of a watch: where they are heard, and how they call a path."""

import logging
import re
import sys
import warnings
from pathlib import Path

_log = logging.getLogger("vitx")


def warn(sentence: str) -> None:
    """Warn; through the logger, which ends at stderr, where a project silences warnings."""
    if silenced(sentence):
        _log.warning(sentence)
    else:
        warnings.warn(sentence, stacklevel=2)


def inform(sentence: str) -> None:
    """Tell what went well: through the logger where someone listens to it, else to stderr."""
    if _log.isEnabledFor(logging.INFO) and _log.hasHandlers():
        _log.info(sentence)
    else:
        print(sentence, file=sys.stderr)


def silenced(sentence: str) -> bool:
    """Return whether the filters of `warnings` ignore it; those of a module or a line do not count."""
    for action, message, category, module, line in warnings.filters:
        about_us = issubclass(UserWarning, category) and not (module or line)
        if about_us and (message is None or re.match(message, sentence)):
            return action == "ignore"
    return False


def path_of(path: str | Path) -> str:
    """Return a path as short as it can be said here: relative, if it is below the working folder."""
    whole, here = Path(path).absolute(), Path.cwd()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)
