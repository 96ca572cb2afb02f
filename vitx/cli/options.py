"""Options of the commands: adding them, reading KEY=VALUE, and what to write for some unknown ones."""

import json
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt

from vitx.errors import VitxError

Kind = tuple[Callable[[Any], Any], str]  # converter that may raise a ValueError; name in messages

_OWN = "--model package.module:name"
_NOW = {
    "--hf": "--model NAME",
    "--factory": _OWN,
    "--module": _OWN,
    "--checkpoint": f"--weights FILE with {_OWN}",
    "--open-clip": "--model open_clip:NAME",
    "--module-options": "--model-options KEY=VALUE",
    "--image-size": "--input-options size=PIXELS",
    "--format": "--save jpg (or webp, png)",
    "--no-pictures": "--save with maps, shards or json alone",
    "--save-maps": "--save png maps, or --save png shards",
    "--json": "--save png json",
    "--writers": "--run-options workers=N",
    "--most-tokens": "--max-tokens N",
    "--device": "--run-options accelerator=gpu",
} | {
    f"--{name}": f"--{kind}-options {name.replace('-', '_')}=VALUE"
    for kind, names in {
        "input": ("mean", "std", "keep-aspect", "frames", "time-axis", "volume", "max-pixels"),
        "method": ("head-fusion", "discard-ratio", "start-layer", "gradient"),
        "run": ("accelerator", "devices", "num-nodes", "strategy", "workers"),
    }.items()
    for name in names
}


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Formatter that keeps the lines of the description, and appends only defaults to the help of options."""

    def _get_help_string(self, action: Action) -> str:
        default = action.default
        if default is None or default is False or default == SUPPRESS or not action.option_strings:
            return action.help or ""
        return f"{action.help} (default: %(default)s)"


def new_parser(description: str, **more: Any) -> ArgumentParser:
    """Return an empty parser with the description of a command."""
    return ArgumentParser(description=description, formatter_class=HelpFormatter, **more)


def add(group: Any, name: str, metavar: Any, help: str, kind: Any = str, **more: Any) -> None:
    """Add an option or a positional argument; an empty metavar makes it a switch.

    An option that takes several words may also be given several times.
    """
    if not metavar:
        more["action"] = "store_true"
    elif more.get("nargs") and name.startswith("-") and kind is str:
        more |= {"metavar": metavar, "action": "extend"}  # with it, older jsonargparse rejects a type
    else:
        more |= {"metavar": metavar, "type": kind}
    group.add_argument(name, help=help, **more)


def new_name(words: Sequence[str], known: Container[str]) -> str:
    """Return what to write for the first option in `_NOW` that is not `known`, in words, or ""."""
    options = (word.partition("=")[0] for word in takewhile("--".__ne__, words))
    gone = (one for one in options if one in _NOW and _key(one) not in known and _key(_NOW[one]) in known)
    return next((f"there is no {old}: write {_NOW[old]}" for old in gone), "")


def _key(option: str) -> str:
    return option.partition(" ")[0].strip("-").replace("-", "_")


def output_folder(options: Any) -> Path:
    """Return the output folder of a command, or raise a VitxError if it is a file."""
    if not options.output:
        raise VitxError("--output is empty: name a folder")
    folder = Path(options.output)
    if folder.exists() and not folder.is_dir():
        raise VitxError(f"--output is the file {folder}: give a folder")
    return folder


def check_least(options: Any, **least: int) -> None:
    """Raise a VitxError if an option was given a value below its minimum."""
    for name, number in least.items():
        if options[name] is not None and options[name] < number:
            raise VitxError(f"--{name.replace('_', '-')} must be at least {number}, found {options[name]}")


def read_settings(
    option: str, words: Sequence[str] | None, kinds: Mapping[str, Kind] | None = None
) -> dict[str, Any]:
    """Read the words of an option: KEY=VALUE, with commas for a list, or a JSON object.

    `kinds` has the kind of value for each known key; None allows any key and value.
    """
    found: dict[str, Any] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        read = _value(word) if word.startswith("{") else {key: _value(value)} if key and equals else None
        if not isinstance(read, dict):
            raise VitxError(f"{option} takes KEY=VALUE, found {word!r}")
        found |= read
    if kinds is None:
        return found
    for key, value in found.items():
        if key not in kinds:
            raise VitxError(f"{option} has no {key!r}: it takes {', '.join(kinds)}")
        try:
            found[key] = kinds[key][0](value)
        except (TypeError, ValueError) as error:
            raise VitxError(f"{option}: {key} must be {kinds[key][1]}, found {value}") from error
    return found


def _value(text: str) -> Any:
    with suppress(ValueError):
        return json.loads(text)
    if "," in text and text[0] not in "[{":
        return [_value(part) for part in text.split(",")]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _numbers(value: Any) -> list[float]:
    return [float(one) for one in (value if isinstance(value, list) else [value])]


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


ANY: Kind = (lambda value: value, "anything")
COUNT: Kind = (PositiveInt, "a whole number from 1")
NUMBERS: Kind = (_numbers, "one number, or several with commas")
SWITCH: Kind = (_switch, "true or false")
TEXT: Kind = (str, "a text")
