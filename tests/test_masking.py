"""Settings as a run stores them: secrets are masked, and paths are relative to the run."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

from vitx.runs.folder import RunFolder, read_facts
from vitx.runs.masking import masked

RUN = Path("/data/me/logs/run/version_0")
_KEYS = """
token HF_TOKEN hub_token accessToken token_value tokens password passwd db-password dbPassword secret
client_secret aws_secret_access_key AWS_ACCESS_KEY_ID api_key apikey apiKey wandb_api_key API-KEY
private_key credentials authorization
"""


@pytest.mark.parametrize(
    "key",
    _KEYS.split(),
)
@pytest.mark.parametrize("value", ["hush", {"value": "hush"}, ["hush"]], ids=["text", "mapping", "list"])
def test_values_under_secret_keys_are_masked(key: str, value: object) -> None:
    assert masked({"a": [{key: value}]}, RUN) == {"a": [{key: "***"}]}


def test_a_number_under_a_secret_key_is_masked() -> None:
    assert masked({"password": 1234}, RUN) == {"password": "***"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer", "bert"),
        ("num_tokens", 197),
        ("class_token", True),
        ("pool", "token"),
        ("token", None),
        ("hub_token", ""),
        ("keys", ["q", "k"]),
        ("sigma", 0.1),
        ("significance", 0.05),
        ("monkey", "x"),
    ],
)
def test_values_under_other_keys_stay(key: str, value: object) -> None:
    assert masked({key: value}, RUN) == {key: value}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("postgresql://me:hush@host:5432/db", "postgresql://***@host:5432/db"),
        ("see https://me:hu@sh@host/a", "see https://***@host/a"),
        ("https://hush@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("https://host/a?token=hush&b=1", "https://host/a?token=***&b=1"),
        ("--api_key=hush --lr=0.1", "--api_key=*** --lr=0.1"),
        ("{'hub_token': 'hush', 'lr': 1}", "{'hub_token': '***', 'lr': 1}"),
        ("Login(token=hush)", "Login(token=***)"),
        ("Authorization: Bearer hush", "Authorization: ***"),
        ("https://host/a", "https://host/a"),
        ("user@host:a", "user@host:a"),
    ],
)
def test_secrets_within_a_text_are_masked(value: str, expected: str) -> None:
    assert masked({"any": [value]}, RUN) == {"any": [expected]}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/data/me/sets/a b", "../../../sets/a b"),
        (Path("/data/me/logs/run/version_0/checkpoints"), "checkpoints"),
        ("/data/me/logs/run/version_0", "."),
        ("file:///data/me/logs/mlruns", "file://../../mlruns"),
        ("sqlite:////data/me/logs/a.db", "sqlite:///../../a.db"),
        ("Folder('/data/me/sets', 3)", "Folder('../../../sets', 3)"),
        ("C:\\Users\\me\\sets", "sets"),
        (PureWindowsPath("C:/Users/me/sets"), "sets"),
        ("sets/here", "sets/here"),
        ("and/or", "and/or"),
        ("a / b", "a / b"),
        ("/", "/"),
    ],
)
@pytest.mark.skipif("sys.platform == 'win32'", reason="paths of POSIX")
def test_absolute_paths_become_relative_to_the_run(value: object, expected: str) -> None:
    assert masked({"root": value}, RUN) == {"root": expected}


@dataclass
class _Settings:
    lr: float
    api_key: str
    inner: Any = None


def test_a_class_that_is_called_like_a_path_keeps_its_name(tmp_path: Path) -> None:
    names = ["/m/0k4j", "token: 1"]
    folder = RunFolder.claim(tmp_path, tmp_path)
    folder.write_facts({"class_names": names, "settings": {"root": str(tmp_path / "data"), "token": "hush"}})
    facts = read_facts(tmp_path / "vitx")
    assert facts is not None
    assert facts["class_names"] == names
    assert facts["settings"] == {"root": "data", "token": "***"}


def test_mappings_dataclasses_and_namespaces_become_plain_values() -> None:
    settings = _Settings(0.1, "hush", Namespace(token="hush", sizes=(1, 2), kinds={"b", "a"}))
    found = masked({1: settings}, RUN)
    inner = {"token": "***", "sizes": [1, 2], "kinds": ["a", "b"]}
    assert found == {"1": {"lr": 0.1, "api_key": "***", "inner": inner}}


def test_other_values_become_those_that_json_knows() -> None:
    settings: dict[str, Any] = {
        "numpy": np.float64(0.5),
        "tensor": torch.tensor(3),
        "class": torch.nn.Linear,
        "object": object(),
        "dtype": torch.float16,
    }
    settings["itself"] = settings
    found = masked(settings, RUN)
    assert (found["numpy"], found["tensor"], found["class"]) == (0.5, 3, "Linear")
    assert (found["object"], found["dtype"]) == ("<object object>", "torch.float16")
    assert json.loads(json.dumps(found)) == found
