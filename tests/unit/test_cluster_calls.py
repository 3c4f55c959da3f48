"""How a Ray cluster is joined or started, by a stand-in for Ray; tests/integration/test_cluster.py uses a real one."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext

import pytest

from pipelines import cluster
from pipelines.cluster import AUTH_MODE, start_ray
from pipelines.settings import Settings, SettingsError

ray = pytest.importorskip("ray")


@pytest.fixture
def calls(monkeypatch):
    """What Ray was asked for; nothing is started."""
    from ray._private.authentication import authentication_token_setup as tokens

    found = []

    def init(**options):
        loopback = os.environ.get(cluster._LOOPBACK_VARIABLE)
        found.append(("init", options, loopback, cluster._started_here.is_set()))

    for name in (*cluster.ENVIRONMENT, "RAY_ADDRESS", AUTH_MODE, cluster._IN_A_JOB, cluster._LOOPBACK_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TINYGPTV_RAY_LOGS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: found.append("shutdown"))
    monkeypatch.setattr(cluster, "ensure_token", lambda: found.append("token"))
    monkeypatch.setattr(cluster, "check_shared_paths", lambda settings: found.append(("paths", settings)))
    monkeypatch.setattr(
        tokens,
        "maybe_enable_token_auth_if_token_available",
        lambda warn_if_disabled: found.append("a warning of Ray's own" if warn_if_disabled else "token, if any"),
    )
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)
    for name in (*cluster.ENVIRONMENT, AUTH_MODE):
        os.environ.pop(name, None)


QUIET = {"logging_level": logging.WARNING, "log_to_driver": False}


def test_a_cluster_is_started_with_a_token_on_loopback_and_stopped_at_the_end(calls, caplog):
    with pytest.raises(KeyError), start_ray(Settings(num_cpus=3)):
        assert cluster._started_here.is_set()
        assert cluster.ENVIRONMENT == {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        assert {name: os.environ[name] for name in cluster.ENVIRONMENT} == cluster.ENVIRONMENT
        assert calls[-1] != "shutdown"
        assert cluster.worker_share(3) == {"worker_shares": 333_333}, "three tasks have room, a fourth has not"
        raise KeyError
    shares = {"worker_shares": 1_000_000}
    options = {"address": "local", "include_dashboard": False, "num_cpus": 3, "resources": shares, **QUIET}
    assert calls == ["token", ("init", options, "0", False), "shutdown"]
    assert not cluster._started_here.is_set() and caplog.text == "" and cluster.worker_share(3) == {}
    assert os.environ.get(cluster._LOOPBACK_VARIABLE) is None


def test_the_network_and_a_cluster_without_tokens_are_warned_of(calls, caplog, monkeypatch):
    monkeypatch.setenv(AUTH_MODE, "disabled")
    with start_ray(Settings(ray_loopback=False)):
        pass
    assert [call[0] if isinstance(call, tuple) else call for call in calls] == ["init", "shutdown"], "no token"
    assert calls[0][2] is None, "not on loopback"
    assert f"this Ray cluster ({AUTH_MODE}=disabled) asks for no token" in caplog.text
    assert "ray_loopback=false: Ray's ports listen on the network" in caplog.text
    monkeypatch.setenv(AUTH_MODE, "Token")
    calls.clear()
    with start_ray(Settings()):
        pass
    assert calls[0] == "token"


def test_a_start_that_was_too_slow_is_tried_again_and_no_other_error(calls, caplog, monkeypatch):
    slow = "The current node timed out during startup. This could happen because some of the raylet failed to startup"
    for errors, tries in (([slow, slow], 3), ([slow] * 4, 3), (["no disk"], 1)):
        asked = []

        def init(errors=tuple(errors), asked=asked, **options):
            asked.append(options)
            if len(asked) <= len(errors):
                raise Exception(errors[len(asked) - 1])

        monkeypatch.setattr(ray, "init", init)
        with (
            nullcontext() if len(errors) == 2 else pytest.raises(Exception, match=errors[0][:9]),
            start_ray(Settings()),
        ):
            assert len(errors) == 2
        assert len(asked) == tries and not cluster._started_here.is_set()
    assert caplog.messages == ["Ray did not start within 30 s on this busy machine; it is started again."] * 4


def test_variables_have_the_names_that_ray_reads():
    from ray._private import ray_constants
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    assert AUTH_MODE == "RAY_AUTH_MODE" and cluster._IN_A_JOB == RAY_JOB_CONFIG_JSON_ENV_VAR
    assert cluster._LOOPBACK_VARIABLE == ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


def test_what_the_environment_says_already_stays(calls, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with start_ray(Settings()):
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_a_process_that_has_a_cluster_keeps_it(calls, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with start_ray(Settings(ray_address="host:1")):
        pass
    assert calls == []


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:6379", "0"), ("localhost:6379", "0"), ("[::1]:6379", "0"), ("10.0.0.1:6379", None), ("auto", None)],
)
def test_a_cluster_is_joined_at_its_address_and_left_at_the_end(calls, caplog, monkeypatch, address, loopback):
    monkeypatch.setenv(AUTH_MODE, "token")
    settings = Settings(ray_address=address)
    with pytest.raises(KeyError), start_ray(settings):
        assert not cluster._started_here.is_set()
        raise KeyError
    assert calls == [
        "token, if any",
        ("init", {"address": address, **QUIET}, loopback, False),
        ("paths", settings),
        "shutdown",
    ]
    assert caplog.text == ""


@pytest.mark.parametrize(("in_a_job", "mode"), [(True, "disabled"), (False, None)])
def test_the_address_of_the_environment_is_joined(calls, caplog, monkeypatch, in_a_job, mode):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:1")
    if in_a_job:
        monkeypatch.setenv(cluster._IN_A_JOB, "{}")
    with start_ray(Settings()):
        assert os.environ.get(AUTH_MODE) == mode
        assert os.environ["RAY_ADDRESS"] == "10.0.0.9:1", "child processes find it, too"
    assert calls[1][1]["address"] == "10.0.0.9:1"
    assert "the Ray cluster at 10.0.0.9:1 asks for no token" in caplog.text
    calls.clear()
    with start_ray(Settings(ray_address="10.0.0.8:1")):
        pass
    assert calls[1][1]["address"] == "10.0.0.8:1", "the settings win"


@pytest.mark.parametrize("error", [ConnectionError("no"), ray.exceptions.AuthenticationError("no")])
def test_a_cluster_that_does_not_answer_is_told_with_its_address_and_token(calls, monkeypatch, error):
    def failing(**options):
        raise error

    monkeypatch.setattr(ray, "init", failing)
    with pytest.raises(SettingsError) as told, start_ray(Settings(ray_address="host:1")):
        pass
    text = str(told.value)
    assert text.startswith(
        "no Ray cluster answers at ray_address='host:1', or it takes another token than this process"
    )
    assert f"({AUTH_MODE}=disabled)" in text and f"give the cluster's token in {cluster.token_path()}" in text
    assert "shutdown" not in calls


def test_the_processs_own_handler_of_sigterm_is_kept(monkeypatch):
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        with cluster._sigterm_handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(ConnectionError), cluster._sigterm_handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise ConnectionError
        assert signal.getsignal(signal.SIGTERM) is own, "a cluster that does not answer leaves no handler of Ray's"
        thread = threading.Thread(target=lambda: cluster._sigterm_handler_kept().__enter__())
        thread.start(), thread.join()
        monkeypatch.setattr(signal, "getsignal", lambda number: None)
        with cluster._sigterm_handler_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, "a handler that Python does not know stays Ray's"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ray_data_is_quiet_and_its_actors_carry_their_arguments(monkeypatch):
    import ray.data
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    carried = []
    monkeypatch.setattr(cluster, "_actor_arguments_by_value", lambda: carried.append(True))
    context = cluster.quiet_ray_data()
    assert context is ray.data.DataContext.get_current() and carried == [True]
    assert (context.enable_progress_bars, context.print_on_execution_start) == (False, False)
    assert logging.getLogger("ray.data").level == logging.WARNING
    assert logging.getLogger("ray.data._internal.progress").level == logging.ERROR
    monkeypatch.undo()

    class Operator:
        _map_transformer_ref = _data_context_ref = "a reference"
        _map_transformer, data_context = "the transformer", "the context"

    monkeypatch.setattr(f"{ActorPoolMapOperator.__module__}.ActorPoolMapOperator", Operator)
    cluster._actor_arguments_by_value()
    made = Operator()
    assert (made._map_transformer_ref, made._data_context_ref) == ("the transformer", "the context")

    class Renamed:
        """Another release of Ray."""

    monkeypatch.setattr(f"{ActorPoolMapOperator.__module__}.ActorPoolMapOperator", Renamed)
    cluster._actor_arguments_by_value()
    assert not hasattr(Renamed, "_map_transformer_ref")


def test_a_token_is_written_beside_its_place_and_never_over_one(tmp_path, monkeypatch):
    drafts, made = [], cluster.tempfile.mkstemp
    monkeypatch.setattr(
        cluster.tempfile, "mkstemp", lambda **where: drafts.append((where["dir"], where["prefix"])) or made(**where)
    )
    path = tmp_path / "deep/er/token"
    cluster.ensure_token(path)
    assert drafts == [(path.parent, ".auth_token")], "a link needs one file system"
    cluster.ensure_token(path)
    assert len(drafts) == 1
    monkeypatch.setattr(type(path), "exists", lambda self: False)  # another process is faster
    cluster._write_once(path, "mine")
    monkeypatch.undo()
    assert len(path.read_text()) == 64 and [each.name for each in path.parent.iterdir()] == ["token"]
    changed = path.stat().st_ctime_ns
    cluster.ensure_token(path)
    assert path.stat().st_ctime_ns == changed, "a private file is left as it is"
