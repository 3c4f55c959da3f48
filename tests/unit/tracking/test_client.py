"""Clients of MLflow, and SQLite databases that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE, UNAUTHENTICATED

from pipelines.tracking import client as module


@pytest.fixture(autouse=True)
def opened(monkeypatch, tmp_path_factory):
    """What clients would open; nothing is left in the working directory."""
    uris, folder = [], tmp_path_factory.mktemp("cwd")

    def client(tracking_uri):
        uris.append(tracking_uri)

    monkeypatch.setattr("mlflow.MlflowClient", client)
    monkeypatch.chdir(folder)
    yield uris
    assert not list(folder.iterdir())


def built(monkeypatch, content=b"whole", error=None):
    """Stands for MLflow, which makes a database in seconds."""
    made = []

    def build(uri):
        made.append(uri)
        Path(uri.removeprefix("sqlite:///")).write_bytes(content)
        if error:
            raise error

    monkeypatch.setattr(module, "_build", build)
    return made


def test_a_database_that_cannot_be_opened_is_asked_once(tmp_path, monkeypatch):
    """MLflow itself would ask ten times, for 100 s, before a training begins and again at its end."""
    from mlflow.store.db import utils

    monkeypatch.setattr(utils, "MAX_RETRY_COUNT", 10)
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: pytest.fail("it is asked again"))
    with pytest.raises(Exception, match="unable to open database file"):
        module.open_client("http://127.0.0.1:9")
        utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{tmp_path}")


def test_mlflow_tries_once_unless_the_environment_says_otherwise(monkeypatch, opened):
    """The model registry, too: the default is minutes for a server that is away."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "99")
    module.open_client("http://127.0.0.1:9")
    assert {name: os.environ[name] for name in wanted} == {**wanted, "MLFLOW_HTTP_REQUEST_TIMEOUT": "99"}


@pytest.mark.parametrize("folder", [".", "new/folder"])
def test_a_missing_database_is_made_whole(tmp_path, monkeypatch, opened, folder):
    made = built(monkeypatch)
    path = tmp_path / folder / "mlflow.db"
    for _ in range(2):
        module.open_client(f"sqlite:///{path}")
    assert path.read_bytes() == b"whole" and len(made) == 1
    assert [each.name for each in path.parent.iterdir()] == ["mlflow.db"]
    assert opened == [f"sqlite:///{path}"] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_a_database_whose_making_is_stopped_is_not_there(tmp_path, monkeypatch, error):
    """MLflow opens no database of which some tables are missing: nothing would be recorded in it, for good."""
    built(monkeypatch, b"half", error)
    with pytest.raises(type(error)):
        module.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_a_database_that_another_process_made_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "mlflow.db"
    monkeypatch.setattr(module, "_build", lambda uri: [Path(uri[10:]).write_bytes(b"new"), path.write_bytes(b"runs")])
    module.open_client(f"sqlite:///{path}")
    assert path.read_bytes() == b"runs" and list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_hard_links_has_its_database(tmp_path, monkeypatch):
    def refused(path, target):
        raise PermissionError("Operation not permitted")

    built(monkeypatch)
    monkeypatch.setattr(Path, "hardlink_to", refused)
    module.open_client(f"sqlite:///{tmp_path}/mlflow.db")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("mlflow.db", b"whole")]


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "sqlite:///:memory:", "sqlite:///x.db?mode=ro", "databricks"])
def test_what_is_no_file_of_sqlite_is_not_made(monkeypatch, opened, uri):
    made = built(monkeypatch)
    module.open_client(uri)
    assert not made and opened == [uri]


def test_a_database_is_made_by_opening_it(opened):
    module._build("sqlite:////folder/mlflow.db")
    assert opened == ["sqlite:////folder/mlflow.db"]


def test_a_server_that_hangs_is_asked_once_a_minute(monkeypatch):
    """A run has five trackers or more: each waited for 20 s where it began, and as long where it ended."""
    now, asked = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, "_hung", {})

    def ask(uri, seconds):
        with module.asking(uri):
            asked.append((uri, now[0]))
            now[0] += seconds
            raise TimeoutError(f"no answer within {seconds} s")

    for uri, seconds, later in (("a", 20, 1), ("a", 20, 30), ("b", 0.1, 0), ("b", 0.1, 40), ("a", 20, 0)):
        with pytest.raises((TimeoutError, ConnectionError), match=f"no answer within {seconds} s"):
            ask(uri, seconds)
        now[0] += later
    assert [(uri, round(at)) for uri, at in asked] == [("a", 100), ("b", 151), ("b", 151), ("a", 191)]


@pytest.mark.parametrize(("code", "status"), [(UNAUTHENTICATED, 401), (PERMISSION_DENIED, 403)])
def test_credentials_that_are_refused_are_told_with_the_fix(code, status):
    with pytest.raises(PermissionError, match=rf"\({status}\): MLFLOW_TRACKING_USERNAME") as told, module.asking("x"):
        raise MlflowException("API request to endpoint /api failed with ..", code)
    assert len(str(told.value)) < 200, "a reason is cut there"
    with pytest.raises(MlflowException, match="later"), module.asking("x"):
        raise MlflowException("later", TEMPORARILY_UNAVAILABLE)
