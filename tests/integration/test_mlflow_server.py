"""MLflow on a cluster's head: its database starts from the copy in the bucket, and never takes the copy's place."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture
def start(tmp_path):
    """Run the script in a home folder; its server only makes a database where it has none, and ten minutes are over
    once, as soon as there is one."""
    make_database(tmp_path / "new.db", "of a new server")
    database = '"$HOME/mlflow/mlflow.db"'
    programs = {
        "pgrep": "exit 1",
        "nohup": f'test -e {database} || cp "{tmp_path}/new.db" {database}; touch "$HOME/started"',
        "sleep": f'test ! -e "$HOME/slept" && touch "$HOME/slept" && until test -s {database}; do /bin/sleep 0.1; done',
        "python": f'exec "{sys.executable}" "$@"',
    }
    (tmp_path / "bin").mkdir()
    for name, line in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)

    def run(home: Path, location: str) -> subprocess.CompletedProcess[str]:
        home.mkdir()
        environment = {**os.environ, "HOME": str(home), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        script = ["bash", str(ROOT / "deploy/mlflow_server.sh"), location]
        return subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=120)

    return run


def make_database(path: Path, value: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table runs (name text)")
        database.execute("insert into runs values (?)", (value,))


def runs_of(path: Path) -> list[str]:
    with sqlite3.connect(path) as database:
        return [name for (name,) in database.execute("select name from runs")]


def test_a_new_head_continues_from_the_copy(start, tmp_path):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    make_database(bucket / "mlflow.db", "of the head before")
    done = start(tmp_path / "home", f"file://{bucket}")
    assert done.returncode == 0, done.stderr
    assert runs_of(tmp_path / "home/mlflow/mlflow.db") == ["of the head before"]


def test_the_first_head_begins_and_its_database_is_copied(start, tmp_path):
    bucket, new = tmp_path / "bucket", tmp_path / "new.db"
    bucket.mkdir()
    done = start(tmp_path / "home", f"file://{bucket}")
    assert done.returncode == 0, done.stderr
    deadline, copied = time.monotonic() + 60, bucket / "mlflow.db"
    while not (copied.is_file() and copied.stat().st_size == new.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert runs_of(copied) == ["of a new server"]


def test_no_empty_database_where_the_copy_cannot_be_read(start, tmp_path):
    done = start(tmp_path / "home", "s3://no-such-bucket-of-ours@@/mlflow")
    assert done.returncode == 1 and "cannot read s3://" in done.stdout
    assert not (tmp_path / "home/started").exists() and not (tmp_path / "home/mlflow/mlflow.db").exists()
