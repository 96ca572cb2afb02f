"""The exception for invalid input, and messages of other exceptions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class VitxError(ValueError):
    """Invalid input; the message is one sentence that says what was found and what to do."""


def in_words(error: BaseException) -> str:
    """Return an error's message on one line, prefixed with its class name unless it is a VitxError."""
    if isinstance(error, VitxError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def failure(sentence: str, say: Callable[[Exception], str] = in_words) -> Iterator[None]:
    """Convert any exception from the block to a VitxError: the sentence, then the original message."""
    try:
        yield
    except VitxError:
        raise
    except Exception as error:
        raise VitxError(f"{sentence}: {say(error)}") from error


def shown(value: Any) -> str:
    """Return the type of a value, with the shape and dtype of an array, or the length of a sequence."""
    kind = type(value).__name__
    if hasattr(value, "dtype"):
        return f"{kind} {tuple(value.shape)} of {value.dtype}"
    return f"{kind} of {len(value)}" if isinstance(value, Sequence) else kind


def last_line(error: BaseException) -> str:
    r"""Return the last line of an error from a DataLoader worker, which wraps the message in a traceback.

    Example:
        >>> last_line(RuntimeError("Caught VitxError in ...\nvitx.errors.VitxError: there is no cat.jpg"))
        'there is no cat.jpg'
    """
    return str(error).strip().splitlines()[-1].removeprefix(f"{VitxError.__module__}.{VitxError.__name__}: ")
