"""Reads the store of MLflow: a database, a folder of an earlier version, or a server."""

import logging
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vitx.errors import VitxError
from vitx.runs import GRIDS
from vitx.runs.logged import Curve, Logged, library

_PICTURES = "images"  # the folder among a run's artifacts
_GRID = re.compile(rf"{GRIDS.replace('/', '~')}\+step\+(\d+)\+timestamp\+(\d+)\+[^+]*\.png")
_SETTINGS = {  # no bars on the console, no calls home, and folders that its newest version would refuse
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
_MOST = 1000  # runs, which are asked for page by page


@dataclass(frozen=True)
class Stored:
    """A run in a store.

    Attributes:
        uri: of the store.
        id: of the run.
        experiment: its name.
        name: of the run.
    """

    uri: str
    id: str
    experiment: str
    name: str


def is_database(file: Path) -> bool:
    """Whether a file is a database of MLflow."""
    with (
        suppress(OSError, sqlite3.Error),
        closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as base,
    ):
        tables = {name for (name,) in base.execute("select name from sqlite_master where type = 'table'")}
        return {"experiments", "runs", "params", "latest_metrics"} <= tables
    return False


def database(uri: str) -> Path | None:
    """Returns the file of an address as sqlite:///mlflow.db; None of another kind.

    Raises:
        VitxError: There is no such file, which MLflow would make.
    """
    kind, _, path = uri.partition(":///")
    if kind != "sqlite":
        return None
    if not is_database(Path(path)):
        raise VitxError(f"there is no MLflow database at {path}, as {uri} says")
    return Path(path)


def is_folder(folder: Path) -> bool:
    """Whether a folder is a store of MLflow's, as it was the default before its version 3.7."""
    metas = [*folder.glob("*/meta.yaml")]
    return any("experiment_id:" in path.read_text("utf-8", "replace") for path in metas[:1])


def stored_runs(uri: str) -> list[Stored]:
    """Lists the runs of a store.

    Raises:
        VitxError: mlflow is not installed, or cannot read the store.
    """
    found = []
    with _client(uri) as client:
        for experiment in client.search_experiments():
            token: str | None = None
            while token != "":
                page = client.search_runs([experiment.experiment_id], max_results=_MOST, page_token=token)
                found += [
                    Stored(uri, run.info.run_id, experiment.name, run.info.run_name or run.info.run_id)
                    for run in page
                ]
                token = page.token or ""
    return found


def read_stored(run: Stored, grids: bool) -> Logged:
    """Reads a run, with its pictures if they are wanted.

    Raises:
        VitxError: mlflow is not installed, or cannot read the store.
    """
    with _client(run.uri) as client:
        data = client.get_run(run.id).data
        scalars = {}
        for tag in data.metrics:
            history = sorted(client.get_metric_history(run.id, tag), key=lambda point: point.timestamp)
            scalars[tag] = Curve.of({point.step: point.value for point in history})
        # It keeps all settings as text, and Lightning joins nested names by slashes.
        settings = {name.replace("/", "."): _value(text) for name, text in data.params.items()}
        config = {"parameters": yaml.safe_dump(settings, allow_unicode=True)} if settings else {}
        return Logged(scalars, dict(_pictures(client, run.id)) if grids else {}, config)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _pictures(client: Any, run_id: str) -> Iterator[tuple[int, bytes]]:
    """Loads the grids; where a resumed run took a step again, the last one holds."""
    files = [file.path for file in client.list_artifacts(run_id, _PICTURES)]
    grids = [(match, path) for path in files if (match := _GRID.search(path))]
    with tempfile.TemporaryDirectory() as folder:
        for match, path in sorted(grids, key=lambda grid: int(grid[0][2])):
            yield int(match[1]), Path(client.download_artifacts(run_id, path, folder)).read_bytes()


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    """Asks a store, and says in a sentence what it answers to that it cannot."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    silenced = logging.root.manager.disable
    os.environ.update(_SETTINGS)
    logging.disable(logging.WARNING)  # it tells of each folder that is none of its own
    try:
        yield library("mlflow", "mlflow").MlflowClient(uri)
    except VitxError:
        raise
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise VitxError(f"MLflow cannot read {uri} ({type(error).__name__}): {said}") from error
    finally:
        logging.disable(silenced)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
