"""Settings as a run stores them: plain values, without secrets or paths of this machine."""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

MASK = "***"

_DEEPEST = 30  # levels; settings that contain themselves are cut here
_SECRET = re.compile(
    r"tokens?(?![a-z])|passw|passphrase|pwd(?![a-z])|secret|credential|bearer(?![a-z])|authorization|webhook"
    r"|(api|access|private|account|ssh|auth)[\W_]?keys?(?![a-z])|(?<![a-z])(sig|signature)(?![a-z])"
)
_COUNTED = re.compile(r"tokens(?![a-z])")  # `num_tokens` is not a secret
_USER = re.compile(r"(?<=://)[^/\s]*@")
_SAID = re.compile(
    r"""([\w.-]+)(["']?\s*(?:=|:(?!//))\s*["']?)((?:bearer |basic )?[^\s"'&;,)\]}]+)""", re.IGNORECASE
)
_PATH = re.compile(r"""(?:(?<=[\s"'=,(\[])|(?<=file://)|(?<=sqlite:///))/[^\s"'=,)\]/][^\s"',)\]]*""")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def masked(value: Any, folder: Path, depth: int = 0) -> Any:
    """Convert settings to plain JSON values, without secrets or paths of this machine.

    Values under keys such as `password`, `hub_token` or `api_key` become `***`, as do user names and
    passwords in URLs. Absolute paths become relative to the folder of the run.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif isinstance(value, argparse.Namespace | SimpleNamespace):
        value = vars(value)
    if depth > _DEEPEST:
        return "..."
    if isinstance(value, Mapping):
        return {
            str(key): MASK if _is_secret(str(key), kept) else masked(kept, folder, depth + 1)
            for key, kept in value.items()
        }
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes | bytearray):
        held = sorted(value, key=str) if isinstance(value, Set) else value
        return [masked(kept, folder, depth + 1) for kept in held]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a scalar of NumPy or torch
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    return _text(value, folder)


def _is_secret(key: str, value: Any) -> bool:
    """Return whether a key names a secret and its value may be one."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    if value is None or isinstance(value, bool) or value == "" or not _SECRET.search(words):
        return False
    return not (isinstance(value, int | float) and _COUNTED.search(words))


def _text(value: Any, folder: Path) -> str:
    text = str(getattr(value, "__qualname__", value))
    if not isinstance(value, str):
        text = _ADDRESS.sub("", text)
    if (Path(text).is_absolute() and len(text) > 1) or PureWindowsPath(text).is_absolute():
        return _relative(text, folder)
    text = _SAID.sub(_said, _USER.sub(f"{MASK}@", text))
    return _PATH.sub(lambda found: _relative(found[0], folder), text)


def _said(found: re.Match[str]) -> str:
    """Mask a secret within a text, as in `--token=...` or a URL."""
    key, between, value = found.groups()
    return f"{key}{between}{MASK}" if _is_secret(key, value) else found[0]


def _relative(path: str, folder: Path) -> str:
    if Path(path).is_absolute():
        return Path(os.path.relpath(path, folder)).as_posix()
    return PureWindowsPath(path).name  # of a path of another system
