"""The one exception that vitx raises on purpose."""


class VitxError(ValueError):
    """Says in one sentence what was found and what to do about it."""
