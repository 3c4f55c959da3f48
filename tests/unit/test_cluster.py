"""Who may reach a cluster that is started here; tests/integration/test_cluster.py looks at a real one."""

from __future__ import annotations

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import cluster
from pipelines.cluster import AUTH_MODE, check_resources, ensure_token, token_path
from pipelines.settings import Settings, SettingsError

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
    assert "cannot be kept" in caplog.text and caplog.text.rstrip().endswith(f"; it is in {path.parent}")


def test_nothing_of_ours_switches_tokens_off():
    assert AUTH_MODE not in cluster.ENVIRONMENT


def test_a_started_cluster_has_what_the_settings_say(monkeypatch):
    monkeypatch.delenv("TINYGPTV_RAY_LOGS", raising=False)
    given = cluster._init_arguments(Settings(num_cpus=3, object_store_mb=100))
    assert (given["num_cpus"], given["object_store_memory"]) == (3, 100 * 2**20)
    assert (given["address"], given["include_dashboard"], given["log_to_driver"]) == ("local", False, False)
    monkeypatch.setenv("TINYGPTV_RAY_LOGS", "1")
    left_to_ray = cluster._init_arguments(Settings())
    assert left_to_ray["log_to_driver"] is True
    assert {"num_cpus", "object_store_memory"}.isdisjoint(left_to_ray)


@pytest.mark.parametrize("before", [None, "1", ""])
def test_loopback_lasts_as_long_as_its_block(monkeypatch, before):
    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", "as it was")
    if before is not None:
        monkeypatch.setenv(cluster._LOOPBACK_VARIABLE, before)
    else:
        monkeypatch.delenv(cluster._LOOPBACK_VARIABLE, raising=False)
    with pytest.raises(KeyError), cluster._loopback():
        assert (os.environ[cluster._LOOPBACK_VARIABLE], ray_constants.ENABLE_RAY_CLUSTER) == ("0", False)
        raise KeyError
    assert (os.environ.get(cluster._LOOPBACK_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER) == (before, "as it was")


@pytest.mark.parametrize("own", [True, False])
def test_what_an_own_cluster_lacks_is_refused_and_another_may_grow(monkeypatch, caplog, own):
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": True, "Resources": {"CPU": 1.0, "TPU": 2.0}}]
    gone = {"Alive": False, "Resources": {"CPU": 9.0, "GPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, gone])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "TPU": 2.0})
    monkeypatch.setattr(cluster._started_here, "is_set", lambda: own)
    check_resources({"CPU": 1, "TPU": 2}, "training")
    check_resources({"CPU": 1, "GPU": 0}, "training", 4)
    check_resources({"CPU": 3, "GPU": 0}, "training")
    assert not caplog.text
    for each, count, lacks in (
        ({"CPU": 1, "GPU": 0.5}, 8, "8 CPUs, and 4 are there; 4 GPUs, and 0 are there"),
        ({"CPU": 5}, 1, "5 CPUs, and 4 are there"),
        ({"CPU": 4, "GPU": 0}, 1, "4 CPUs on one node, and no node has them"),
        ({"CPU": 2, "TPU": 1}, 1, "2 CPUs and 1 TPUs on one node, and no node has them"),
    ):
        message = f"training (num_workers=8) needs {lacks}"
        if own:
            with pytest.raises(SettingsError, match=re.escape(f"{message}: ask for less, or give the cluster")):
                check_resources(each, "training (num_workers=8)", count)
        else:
            check_resources(each, "training (num_workers=8)", count)
            assert f"{message}: waiting for nodes" in caplog.text
