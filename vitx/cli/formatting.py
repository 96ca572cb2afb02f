"""How options are added, and how the help looks."""

from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from typing import Any

from jsonargparse import DefaultHelpFormatter

from vitx.errors import VitxError


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and says of an option no more than what it is without."""

    def _get_help_string(self, action: Action) -> str:
        default, help = action.default, action.help or ""
        if default is None or default is False or default in ({}, SUPPRESS) or not action.option_strings:
            return help
        words = default if isinstance(default, list) else [default]
        return f"{help} (default: {' '.join(map(str, words))})".replace("%", "%%")


def add(group: Any, name: str, metavar: str, said: str, kind: Any = str, **more: Any) -> None:
    """Adds an option, or what is given without one; without a metavar, a switch."""
    if metavar:
        more |= {"metavar": metavar} if more.get("action") else {"metavar": metavar, "type": kind}
    group.add_argument(name, help=said, **(more or {"action": "store_true"}))


def check_least(options: Any, **least: int) -> None:
    """Raises a VitxError if an option that was given is less than it may be."""
    for name, number in least.items():
        if options[name] is not None and options[name] < number:
            raise VitxError(f"--{name.replace('_', '-')} must be at least {number}, found {options[name]}")
