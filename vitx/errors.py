"""The one exception that vitx raises on purpose, and how any other is said."""


class VitxError(ValueError):
    """Says in one sentence what was found and what to do about it."""


def in_words(error: BaseException) -> str:
    """Returns what an error says; of one that is not vitx's own, also its kind."""
    return str(error) if isinstance(error, VitxError) else f"{type(error).__name__}: {error}"


def last_line(error: BaseException) -> str:
    r"""Returns what went wrong in a worker of a DataLoader, which wraps it in a traceback: its last line.

    Example:
        >>> last_line(RuntimeError("Caught VitxError in ...\nvitx.errors.VitxError: there is no cat.jpg"))
        'there is no cat.jpg'
    """
    return str(error).strip().splitlines()[-1].removeprefix(f"{VitxError.__module__}.{VitxError.__name__}: ")
