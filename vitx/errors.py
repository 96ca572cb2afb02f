"""The exception for mistakes in what vitx is given, and messages of other exceptions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class VitxError(ValueError):
    """A mistake in what vitx is given: one sentence that says what was found and what to do."""


def in_words(error: BaseException) -> str:
    """Return the message of an error on one line, after the name of its class unless it is a VitxError."""
    if isinstance(error, VitxError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def failure(sentence: str, say: Callable[[Exception], str] = in_words) -> Iterator[None]:
    """Raise a VitxError, of a sentence and what the error says, if its block fails, whatever it raises."""
    try:
        yield
    except VitxError:
        raise
    except Exception as error:
        raise VitxError(f"{sentence}: {say(error)}") from error


def last_line(error: BaseException) -> str:
    r"""Return the last line of an error from a worker of a DataLoader, which wraps it in a traceback.

    Example:
        >>> last_line(RuntimeError("Caught VitxError in ...\nvitx.errors.VitxError: there is no cat.jpg"))
        'there is no cat.jpg'
    """
    return str(error).strip().splitlines()[-1].removeprefix(f"{VitxError.__module__}.{VitxError.__name__}: ")
