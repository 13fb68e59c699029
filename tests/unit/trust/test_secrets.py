"""Secrets of a configuration: told by their names, read from elsewhere, never written."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from helpers.network import toy_answer
from helpers.paths import ROOT
from sdsearch_lightning.cli.errors import fail
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.report.summary import read_summary
from sdsearch_lightning.retrieval import RemoteRetriever
from sdsearch_lightning.runs.folder import RunFolder
from sdsearch_lightning.runs.model_card import Training, write_card
from sdsearch_lightning.trust.secrets import SECRET, names_secret, read_secret, without_secrets

CONFIG = """
data:
  init_args:
    retriever:
      class_path: RemoteRetriever
      init_args: {url: 'http://user:secret-word@127.0.0.1:8000/retrieve', token: secret-token}
    train_files: ['https://user:secret-word@host/train.jsonl?token=secret-query&split=1']
trainer:
  logger:
    - class_path: lightning.pytorch.loggers.WandbLogger
      init_args: {offline: true, api_key: secret-key, headers: {Authorization: Bearer secret-bearer}}
model: {model_name_or_path: owner/name, optimizer: {}}
rollout: {max_tokens: 200}
"""


def test_a_configuration_full_of_secrets() -> None:
    config = yaml.safe_load(CONFIG)
    clean = without_secrets(config)
    assert "secret-" not in str(clean), clean
    retriever = clean["data"]["init_args"]["retriever"]["init_args"]
    assert retriever == {"url": "http://127.0.0.1:8000/retrieve", "token": SECRET}
    assert clean["data"]["init_args"]["train_files"] == [f"https://host/train.jsonl?token={SECRET}&split=1"]
    assert clean["rollout"] == {"max_tokens": 200} and clean["trainer"]["logger"][0]["init_args"]["offline"] is True
    assert without_secrets(clean) == clean and "secret-token" in str(config), "a copy, which stays as it is"


@pytest.mark.parametrize("key", ["token", "hf_token", "password", "db_password", "API_KEY", "secret", "aws_secret_key"])
def test_names_of_secrets(key: str) -> None:
    assert names_secret(key) and names_secret(f"data.init_args.{key}")
    assert without_secrets({key: "abc", "x": {key: ["abc"]}}) == {key: SECRET, "x": {key: SECRET}}
    assert without_secrets({key: 7}) == {key: SECRET}
    for harmless in ("env:NAME", "file:/run/secret", None, "", True):
        assert without_secrets({key: harmless}) == {key: harmless}


@pytest.mark.parametrize(
    "key",
    [
        "tokens",
        "max_tokens",
        "max_turn_tokens",
        "eos_token",
        "pad_token_id",
        "tokenizer",
        "monkey",
        "keys",
        "secretary",
    ],
)
def test_names_of_no_secrets(key: str) -> None:
    assert not names_secret(key) and without_secrets({key: "abc"}) == {key: "abc"}


def test_no_other_option_of_ours_counts_as_one() -> None:
    """Scrubbed, it would be lost to whoever uses the saved configuration again."""
    files = [
        path for name in ("sdsearch_lightning", "callbacks", "datamodules") for path in (ROOT / name).rglob("*.py")
    ]
    names = {
        node.arg if isinstance(node, ast.arg) else node.target.id
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arg) or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    }
    assert {"tokens", "max_turn_tokens"} <= names and {name for name in names if names_secret(name)} == {"token"}


@pytest.mark.parametrize("text", ["owner/name@main", "mail me@host.org", "http://host/a@b", "see http://host, or a@b"])
def test_texts_that_stay(text: str) -> None:
    assert without_secrets(text) == text


# Where they come from


def test_a_secret_is_read_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abc")
    (tmp_path / "token").write_text("abc\n")
    assert [read_secret(v, "token") for v in ("env:SOME_TOKEN", f"file:{tmp_path}/token", "abc", None)] == [
        *["abc"] * 3,
        None,
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("env:NO_TOKEN", "token: expected the environment variable NO_TOKEN, found none"),
        ("file:/no/token", "token: expected a text file /no/token, found none"),
        ("file:/dev/null", "token: expected a secret in /dev/null, found nothing"),
        (SECRET, "the configuration was saved without. Set token to env:VARIABLE"),
    ],
)
def test_a_secret_that_is_not_there(value: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_secret(value, "token")
    assert len(str(caught.value).splitlines()) == 1


def test_a_client_sends_what_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return toy_answer(request)

    client = httpx.Client
    monkeypatch.setattr(
        httpx, "Client", lambda **o: client(transport=httpx.MockTransport(answer), headers=o["headers"])
    )
    retriever = RemoteRetriever(token="env:SOME_TOKEN")
    with pytest.raises(ConfigError, match="SOME_TOKEN"):
        retriever.prepare()
    monkeypatch.setenv("SOME_TOKEN", "abc")
    retriever.search(["tea"], 1)
    assert seen == ["Bearer abc"] and "abc" not in str(vars(retriever) | {"_client": None})


# Where they do not go


def test_a_run_is_the_same_with_another_secret(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    config = yaml.safe_load(CONFIG)
    folder.config.write_text(yaml.safe_dump(without_secrets(config)))
    folder.check_owner(config)
    init_args: dict[str, Any] = config["data"]["init_args"]["retriever"]["init_args"]
    init_args["token"] = "env:SOME_TOKEN"
    folder.check_owner(config)
    folder.config.write_text(CONFIG)  # of a release that wrote them
    folder.check_owner(config)
    init_args["url"] = "http://127.0.0.1:9000/retrieve"
    with pytest.raises(ConfigError, match="another configuration: .*url") as caught:
        folder.check_owner(config)
    assert "secret-" not in str(caught.value)


def test_a_model_is_published_without(tmp_path: Path) -> None:
    write_card(tmp_path, Training(yaml.safe_load(CONFIG), 3, read_summary(tmp_path)))
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "RemoteRetriever" in written and "secret-" not in written


def test_an_error_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("cannot reach http://user:secret-word@host/x?token=secret-token")
    assert capsys.readouterr().err == f"error: cannot reach http://host/x?token={SECRET}\n"
    with pytest.raises(ConfigError, match="url is 'http://") as caught:
        RemoteRetriever("http://user:secret-word@host:port/")
    assert "secret-word" not in str(caught.value)
