"""What the callback says: once, and where it is heard."""

import warnings

from lightning_utilities.core import rank_zero


def warn(sentence: str) -> None:
    """Warns, on rank 0; through Lightning's logger where a project silences warnings."""
    if _silenced():
        rank_zero.rank_zero_only(rank_zero.log.warning)(sentence)
    else:
        rank_zero.rank_zero_warn(sentence)


def inform(sentence: str) -> None:
    """Says what went well, on rank 0."""
    rank_zero.rank_zero_info(sentence)


def _silenced() -> bool:
    """Whether the filters of `warnings` let no `UserWarning` through, whatever it says."""
    for action, message, category, module, line in warnings.filters:
        if issubclass(UserWarning, category) and not (message or module or line):
            return action == "ignore"
    return False
