"""Attempts at what may fail while a model trains: an error is said once, and the training goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitx.errors import VitxError, in_words
from vitx.watch.host import Host
from vitx.watch.loggers import name_of
from vitx.watch.messages import path_of


class Attempts:
    """Run what may fail; errors stop the training, on all ranks together, only if they are to be raised."""

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self._said: set[tuple[str, str]] = set()

    def on_first(self, host: Host, do: Callable[[], Any]) -> None:
        """Run on rank 0 alone; where errors are raised, no other rank is left waiting."""
        if self._raises:
            host.group.from_first(lambda: (do(), None)[1])
        elif host.group.rank == 0:
            do()

    def write(self, host: Host, place: Any, write: Callable[[], Any]) -> bool:
        """Return whether a logger or a folder took what is written; one that fails does not stop others."""
        name = path_of(place) if isinstance(place, Path) else name_of(place)
        taken: Any = False
        with self.forgiving(host, f"cannot write to {name}"):
            taken = write()
        return taken is not False

    @contextmanager
    def forgiving(self, host: Host, what: str, when: str = "") -> Iterator[None]:
        """Say what its block could not do, and go on, unless errors are to be raised."""
        try:
            yield
        except Exception as error:
            if self._raises:
                raise
            self.say(host, what, error, when)

    def say(self, host: Host, what: str, error: Exception, when: str = "") -> None:
        """Warn once of each kind of error in each place, as its text may name a step or an address."""
        known = (what, str(error) if isinstance(error, VitxError) else type(error).__name__)
        if known not in self._said:
            self._said.add(known)
            if host.group.rank == 0:
                host.warn(f"{host.name} {what}{when}: {in_words(error)}")
