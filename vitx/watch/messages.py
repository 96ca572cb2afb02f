"""Messages of a watch: where they are heard, and that what fails is said once while the training goes on."""

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitx.errors import VitxError, in_words

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


class Attempts:
    """Attempts at what may fail: errors stop the training, on all ranks together, only if asked for."""

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self._said: set[tuple[str, str]] = set()

    def on_first(self, host: Any, do: Callable[[], None]) -> None:
        """Run on rank 0 alone; where errors are raised, no other rank is left waiting."""
        if self._raises:
            host.group.from_first(do)
        elif host.group.rank == 0:
            do()

    @contextmanager
    def forgiving(self, host: Any, what: str, when: str = "") -> Iterator[None]:
        """Say what its block could not do, and go on, unless errors are to be raised."""
        try:
            yield
        except Exception as error:
            if self._raises:
                raise
            self.say(host, what, error, when)

    def say(self, host: Any, what: str, error: Exception, when: str = "") -> None:
        """Warn once of each kind of error in each place: texts may differ by a step or an address."""
        known = (what, str(error) if isinstance(error, VitxError) else type(error).__name__)
        if known not in self._said and host.group.rank == 0:
            host.warn(f"{host.name} {what}{when}: {in_words(error)}")
        self._said.add(known)
