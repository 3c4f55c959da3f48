"""Who may reach a cluster that is started here; tests/integration/test_cluster.py looks at a real one."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import cluster
from pipelines.cluster import AUTH_MODE, ensure_token, token_path

pytestmark = pytest.mark.security


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", AUTH_MODE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_token_is_made_once_and_only_its_owner_reads_it(home):
    ensure_token()
    token = token_path().read_text()
    assert token_path() == home / ".ray/auth_token"
    assert len(token) == 64 and int(token, 16)
    assert stat.S_IMODE(token_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(token_path().parent.stat().st_mode) == 0o700
    ensure_token()
    assert token_path().read_text() == token
    assert [path.name for path in token_path().parent.iterdir()] == ["auth_token"]


def test_a_token_that_others_can_read_is_closed(home):
    token_path().parent.mkdir()
    token_path().write_text("known")
    token_path().chmod(0o644)
    ensure_token()
    assert (token_path().read_text(), stat.S_IMODE(token_path().stat().st_mode)) == ("known", 0o600)


def test_processes_that_start_together_share_one_token(home):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: ensure_token(home / "x/token"), range(64)))
    assert len((home / "x/token").read_text()) == 64
    assert [path.name for path in (home / "x").iterdir()] == ["token"]


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_of_the_environment_is_left_alone(home, monkeypatch, name):
    monkeypatch.setenv(name, "mine")
    ensure_token()
    assert not token_path().exists()


def test_without_a_home_folder_the_token_is_in_a_private_one(home, monkeypatch, caplog):
    (home / ".ray").write_text("a file where the folder should be")
    ensure_token()
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "cannot be kept" in caplog.text


def test_nothing_of_ours_switches_tokens_off():
    assert AUTH_MODE not in cluster.ENVIRONMENT
