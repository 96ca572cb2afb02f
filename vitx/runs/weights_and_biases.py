"""Reads the folders that Weights & Biases leaves on the disk, `wandb/offline-run-...` and `wandb/run-...`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from vitx.errors import VitxError
from vitx.runs import GRIDS
from vitx.runs.logged import Curve, Logged, library

FILE = "run-*.wandb"
_STEPS = ("trainer/global_step", "train/global_step", "_step")  # of Lightning, of transformers, its own
_MAGIC, _BLOCK, _HEADER = b":W&B", 2**15, 7  # bytes; a log in the form of LevelDB's, with a head of 7 bytes
_WHOLE, _LAST = 1, 4  # kinds of pieces that end a record


def name_of(file: Path) -> str:
    """Returns what a run is called: the name that was given to it, else that of its file."""
    for record in _records(file):
        if record.WhichOneof("record_type") == "run":
            return str(record.run.display_name or record.run.run_id)
    return file.stem


def read_wandb(files: Sequence[Path], grids: bool) -> Logged:
    """Reads a run.

    Args:
        files: `run-ID.wandb` of the run, and of each resumption in order; the last one holds.
        grids: whether the pictures are wanted.

    Raises:
        VitxError: wandb is not installed, or a file is none of its own.
    """
    values: dict[str, dict[int, float]] = {}
    pictures: dict[int, bytes] = {}
    settings: dict[str, Any] = {}
    for file in files:
        for record in _records(file):
            kind = record.WhichOneof("record_type")
            if kind in ("run", "config"):
                updates = (record.run.config if kind == "run" else record.config).update
                settings |= {_key(item): json.loads(item.value_json) for item in updates}
            elif kind == "history":
                row = {_key(item): json.loads(item.value_json) for item in record.history.item}
                _take(row, values)
                if grids:
                    pictures |= _picture(row, file.parent / "files")
    settings.pop("_wandb", None)  # its own
    config = {"config": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)} if settings else {}
    return Logged({tag: Curve.of(points) for tag, points in values.items()}, pictures, config)


def _take(row: dict[str, Any], values: dict[str, dict[int, float]]) -> None:
    """Adds the numbers of what was logged at once."""
    step = _step(row)
    if step is None:
        return
    for tag, value in row.items():
        own = tag.startswith(("_", f"{GRIDS}/")) or tag in _STEPS
        if isinstance(value, int | float) and not isinstance(value, bool) and not own:
            values.setdefault(tag, {})[step] = value


def _picture(row: dict[str, Any], folder: Path) -> dict[int, bytes]:
    """Returns step -> the grid of what was logged at once, if there is one."""
    step, names = _step(row), row.get(f"{GRIDS}/filenames")
    if step is not None and names:
        with suppress(OSError):  # deleted since
            return {step: (folder / names[0]).read_bytes()}
    return {}


def _step(row: dict[str, Any]) -> int | None:
    return next((int(row[name]) for name in _STEPS if isinstance(row.get(name), int | float)), None)


def _key(item: Any) -> str:
    return "/".join(item.nested_key) or str(item.key)


def _records(file: Path) -> Iterator[Any]:
    """Reads a log record by record; what a killed run left unfinished at its end is left out."""
    protocol = library("wandb.proto.wandb_internal_pb2", "wandb")
    data, at, record = file.read_bytes(), _HEADER, b""
    if not data.startswith(_MAGIC):
        raise VitxError(f"{file} is no file of Weights & Biases: it is damaged, or of something else")
    while at + _HEADER <= len(data):
        if (room := -at % _BLOCK) < _HEADER:  # too little for a header: padding
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += _HEADER
        if at + length > len(data):
            return
        record += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            try:
                yield protocol.Record.FromString(record)
            except Exception as error:  # protobuf's own kind differs from version to version
                raise VitxError(f"{file} is damaged at byte {at}: {error}") from error
            record = b""
