"""Start and stop: what is looked for before Ray starts, what is asked of Ray Serve, and that all of it ends again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from pipelines.serving import foreground, run
from pipelines.serving.run import ServingError, deploy, serve_address, serving, shut_down
from pipelines.settings import ServeSettings, SettingsError

STOPPING = "Stopping when the answers in flight are finished; Ctrl-C again stops at once ..."
NAMES = ("ingress", "tinygptv")


@pytest.fixture
def order(monkeypatch):
    """What is done in which order, by a cluster and a Serve that only note it; the artifact is found as ``/found``."""
    done = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in run.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run, "check_artifact", lambda settings: f"/found/{settings.artifact}")
    monkeypatch.setattr(run, "_claim_port", lambda host, port: done.append(("port", host, port)) or port or 4321)

    @contextlib.contextmanager
    def start_ray(settings):
        done.append(("ray", settings.artifact, os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"]))
        yield
        done.append("ray ends")

    monkeypatch.setattr(run, "start_ray", start_ray)
    monkeypatch.setattr(run, "check_resources", lambda *asked: done.append(asked))
    monkeypatch.setattr(run, "serve_address", lambda: None)
    monkeypatch.setattr(run, "shut_down", lambda: done.append("serve ends"))
    monkeypatch.setattr(serve, "delete", lambda name: done.append(("delete", name)))
    return done


@pytest.fixture
def deployed(order, monkeypatch):
    monkeypatch.setattr(run, "_deploy", lambda settings: order.append(("deploy", settings.artifact)) or "http://here")
    return order


def start(**settings):
    with serving(ServeSettings(**{"artifact": "x", **settings})) as address:
        return address


def test_ray_is_started_with_serves_environment_and_all_ends_again(deployed):
    assert start(num_gpus=0.5, num_replicas=3, cpus_per_replica=2, port=77) == "http://here"
    assert deployed == [
        ("port", "127.0.0.1", 77),
        ("ray", "/found/x", "1"),
        ({"CPU": 2.0, "GPU": 0.5}, "serving (num_replicas=3, cpus_per_replica=2, num_gpus=0.5)", 3),
        ("deploy", "/found/x"),
        "serve ends",
        "ray ends",
    ]
    guard = "pipelines.serving.connections:guard_connections"
    assert os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == guard


def test_a_service_that_ran_before_stays_and_a_failure_ends_what_was_started(deployed, monkeypatch):
    monkeypatch.setattr(run, "serve_address", lambda: "http://before")
    start()
    assert deployed[-2:] == [("delete", "tinygptv"), "ray ends"]

    def fails(settings):
        raise ServingError("no")

    monkeypatch.setattr(run, "_deploy", fails)
    monkeypatch.setattr(run, "serve_address", lambda: None)
    with pytest.raises(ServingError):
        start()
    assert deployed[-1] == "serve ends"


@pytest.mark.parametrize("by", ["settings", "environment", "this process"])
def test_the_port_of_a_cluster_that_runs_is_its_own_matter(deployed, monkeypatch, by):
    if by == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: by == "this process")
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "9")
    start(**({"ray_address": "auto"} if by == "settings" else {}))
    assert deployed[0] == ("ray", "/found/x", "9"), "what the environment says stays"


# ------------------------------------------------------------------------------------------------------- deploy


@pytest.fixture
def asked(order, monkeypatch):
    monkeypatch.setattr(run, "build_app", lambda settings: ("app", settings.artifact))
    monkeypatch.setattr(serve, "start", lambda **options: order.append(options["http_options"]))
    monkeypatch.setattr(serve, "run", lambda app, name, route_prefix: order.append((app, name, route_prefix)))
    monkeypatch.setattr(run, "_wait_until_healthy", lambda address: order.append(("healthy", address)))
    monkeypatch.setattr(run, "_num_replicas", lambda: 0)
    return order


COUNT_REPLICAS = run._num_replicas
APP = (("app", "/found/x"), "tinygptv", "/")


@pytest.mark.parametrize(
    ("host", "port", "url"),
    [
        ("0.0.0.0", 77, "http://127.0.0.1:77"),
        ("0.0.0.0", 0, "http://127.0.0.1:4321"),
        ("10.0.0.5", 0, "http://10.0.0.5:4321"),
    ],
)
def test_serve_is_started_where_it_does_not_run(asked, host, port, url):
    assert deploy(ServeSettings(artifact="x", host=host, port=port, api_keys=["k"])) == url
    options = {"host": host, "port": port or 4321}
    assert asked == [("port", host, port), options, APP, ("healthy", url)]


@pytest.mark.parametrize("error", [TimeoutError("HTTP proxies not available"), ray.exceptions.ActorDiedError()])
def test_a_serve_that_is_too_slow_for_itself_is_waited_for(asked, monkeypatch, caplog, error):
    errors, start = [error], serve.start

    def slow(**options):
        start(**options)
        if errors:
            raise errors.pop()

    monkeypatch.setattr(serve, "start", slow)
    deploy(ServeSettings(artifact="x", port=77))
    options = {"host": "127.0.0.1", "port": 77}
    assert asked == [("port", "127.0.0.1", 77), options, options, APP, ("healthy", "http://127.0.0.1:77")]
    assert caplog.messages == ["Ray Serve takes more than a minute to start on this busy machine; waiting for it."]


def test_a_replacement_needs_room_beside_the_model_that_answers_meanwhile(asked, monkeypatch):
    """Ray would wait for it for ever."""
    states = {"RUNNING": 2, "STARTING": 1}
    model = SimpleNamespace(deployments={"model": SimpleNamespace(replica_states=states)})
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"other": None, "tinygptv": model}))
    for num_old, gpus, wanted in ((3, 0, 5), (1, 0, 3), (0, 0, None), (3, 1, None)):
        asked.clear()
        states.update(RUNNING=num_old, STARTING=0)
        monkeypatch.setattr(run, "_num_replicas", COUNT_REPLICAS)
        deploy(ServeSettings(artifact="x", num_replicas=2, cpus_per_replica=1.5, num_gpus=gpus))
        checks = [entry for entry in asked if isinstance(entry, tuple) and isinstance(entry[0], dict)]
        beside = f"beside {num_old} that answer{'' if num_old == 3 else 's'} until then"
        what = f"replacing the served model (num_replicas=2, cpus_per_replica=1.5, {beside})"
        assert checks == ([({"CPU": 1.5}, what, wanted)] if wanted else [])
        assert not checks or asked.index(checks[0]) < asked.index(APP)
    for applications in ({}, {"tinygptv": SimpleNamespace(deployments={})}):
        monkeypatch.setattr(serve, "status", lambda found=applications: SimpleNamespace(applications=found))
        assert COUNT_REPLICAS() == 0


@pytest.mark.parametrize(
    "call", [lambda settings: start(**settings), lambda settings: deploy(ServeSettings(**settings))]
)
def test_an_open_server_without_keys_is_told_once(asked, monkeypatch, caplog, call):
    monkeypatch.delenv(run.KEYS_VARIABLE, raising=False)
    call({"host": "0.0.0.0"})
    assert len(caplog.messages) == 1 and "there are no API keys" in caplog.text


@pytest.mark.parametrize(
    ("host", "port", "warns"),
    [("10.0.0.5", 77, True), ("10.0.0.5", 0, False), ("10.0.0.5", 5, False), ("127.0.0.1", 5, True)],
)
def test_the_address_of_a_serve_that_runs_stays(asked, monkeypatch, caplog, host, port, warns):
    monkeypatch.setattr(run, "serve_address", lambda: "http://10.0.0.5:5")
    assert deploy(ServeSettings(artifact="x", host=host, port=port, api_keys=["k"])) == "http://10.0.0.5:5"
    assert asked == [APP, ("healthy", "http://10.0.0.5:5")]
    warned = ["Ray Serve is running at http://10.0.0.5:5; the model is served there."]
    assert caplog.messages == (warned if warns else [])


@pytest.mark.parametrize("error", [None, RuntimeError("full")])
def test_a_caller_that_seeds_deploys_another_version_each_time(asked, monkeypatch, error):
    """Serve names versions by Python's random numbers, and the caller's own go on as if nothing was drawn."""
    versions, after = [], []

    def run_app(*_, **__):
        versions.append(random.random())
        if error:
            raise error

    monkeypatch.setattr(serve, "run", run_app)
    for _ in range(2):
        random.seed(0)
        with contextlib.suppress(ServingError):
            deploy(ServeSettings(artifact="x"))
        after.append(random.random())
    assert len(set(versions)) == 2 and after == [random.Random(0).random()] * 2


@pytest.mark.parametrize("kind", [RuntimeError, RayServeException])
def test_a_model_that_does_not_start_is_one_sentence(asked, monkeypatch, kind):
    def fails(*_, **__):
        raise kind("deploying\nValueError: the folder is empty\n")

    monkeypatch.setattr(serve, "run", fails)
    with pytest.raises(ServingError, match=r"^the model did not start: ValueError: the folder is empty$"):
        deploy(ServeSettings(artifact="x"))
    assert issubclass(ServingError, ValueError) and not issubclass(ServingError, SettingsError)
    assert ("healthy", "http://127.0.0.1:8000") not in asked


def test_a_service_is_ready_when_its_health_is_good(monkeypatch):
    statuses = [SimpleNamespace(status_code=status) for status in (404, 503, 200)]
    answers = [httpx.ConnectError("refused"), *statuses]
    asked, slept = [], []

    def get(url, **options):
        asked.append((url, options))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(run.httpx, "get", get)
    monkeypatch.setattr(run.time, "sleep", slept.append)
    run._wait_until_healthy("http://a")
    assert asked == [("http://a/healthz", {"timeout": 10, "trust_env": False})] * 4 and slept == [0.2] * 3
    now = iter(range(0, 5000, 125))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    answers[:] = [SimpleNamespace(status_code=500)] * 9
    with pytest.raises(ServingError, match=r"^http://a/healthz did not become healthy within 300 s\.$"):
        run._wait_until_healthy("http://a")
    assert len(answers) == 7, "at 125 and 250 s"


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (SimpleNamespace(http_config=SimpleNamespace(host="0.0.0.0", port=81)), "http://127.0.0.1:81"),
        (SimpleNamespace(http_config=SimpleNamespace(host="10.0.0.5", port=81)), "http://10.0.0.5:81"),
        (None, None),
        (RayServeException("gone"), None),
    ],
)
def test_where_serve_listens(monkeypatch, client, address):
    def get(raise_if_no_controller_running):
        assert raise_if_no_controller_running is False
        if isinstance(client, Exception):
            raise client
        return client

    monkeypatch.setattr(serve.context, "_get_global_client", get)
    assert serve_address() == address


@pytest.mark.parametrize("looks", [0, 2])
def test_serve_has_stopped_when_its_controller_is_gone(monkeypatch, looks):
    done = []
    controller = SimpleNamespace(graceful_shutdown=SimpleNamespace(remote=lambda wait: ("stop", wait)))
    client = SimpleNamespace(_controller=controller, _shutdown=False)

    def get_actor(name, namespace):
        done.append((name, namespace))
        if len(done) > looks + 1:
            raise ValueError("no such actor")

    monkeypatch.setattr(serve.context, "_get_global_client", lambda raise_if_no_controller_running: client)
    monkeypatch.setattr(ray, "get", done.append)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(serve, "shutdown", lambda: done.append(("shutdown", client._shutdown)))
    shut_down()
    assert done[0] == ("stop", False) and done[-1] == ("shutdown", True)
    assert done[1:-1] == [("SERVE_CONTROLLER_ACTOR", "serve")] * (looks + 1)
    done.clear()
    monkeypatch.setattr(serve.context, "_get_global_client", lambda raise_if_no_controller_running: None)
    shut_down()
    assert done == []


def test_a_controller_that_stays_is_not_waited_for_without_an_end(monkeypatch):
    client = SimpleNamespace(_controller=SimpleNamespace(graceful_shutdown=SimpleNamespace(remote=lambda wait: 0)))
    now = iter(range(0, 1000, 10))
    done = []
    monkeypatch.setattr(serve.context, "_get_global_client", lambda raise_if_no_controller_running: client)
    monkeypatch.setattr(ray, "get", lambda _: None)
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: done.append("looked"))
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(serve, "shutdown", lambda: done.append("shutdown"))
    shut_down()
    assert done == ["looked", "looked", "shutdown"], "at 10 and 20 of 30 s"


# --------------------------------------------------------------------------------------------------- foreground


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_foreground_serves_until_a_signal(monkeypatch, capsys, number):
    handlers, done = {}, []

    @contextlib.contextmanager
    def start(settings):
        assert not handlers, "Ray sets its own while it starts"
        done.append(settings.num_replicas)
        yield "http://a:1"
        done.append("stopped")

    class Event:
        is_set = False

        def set(self):
            self.is_set = True

        def clear(self):
            self.is_set = False

        def wait(self):
            assert "is ready" in capsys.readouterr().out
            handlers[number](number, None)
            assert self.is_set

    def finish(within_s, stops_now):
        assert capsys.readouterr().out == STOPPING + "\n" and not stops_now.is_set
        handlers[number](number, None)
        assert stops_now.is_set
        done.append(within_s)

    monkeypatch.setattr(run, "serving", start)
    monkeypatch.setattr(run, "finish_answers", finish)
    monkeypatch.setattr(foreground.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(foreground, "threading", SimpleNamespace(Event=Event))
    foreground.serve_until_stopped(ServeSettings(num_replicas=2, request_timeout_s=7))
    assert done == [2, 7, "stopped"] and set(handlers) == {signal.SIGINT, signal.SIGTERM}


def test_the_foreground_says_what_it_does(monkeypatch, capsys):
    monkeypatch.setattr(run, "serving", lambda settings: contextlib.nullcontext("http://a:1"))
    monkeypatch.setattr(foreground.signal, "signal", lambda *_: None)
    monkeypatch.setattr(run, "finish_answers", lambda *_: None)
    event = SimpleNamespace(wait=lambda: None, clear=lambda: None)
    monkeypatch.setattr(foreground, "threading", SimpleNamespace(Event=lambda: event))
    for replicas, text in ((1, "1 replica"), (2, "2 replicas")):
        foreground.serve_until_stopped(ServeSettings(num_replicas=replicas))
        assert capsys.readouterr().out.splitlines() == [
            f"Starting Ray and {text} of the model (about 20 s) ...",
            "TinyGPT-V is ready: http://a:1 (web page), http://a:1/v1 (API). Ctrl-C stops it.",
            STOPPING,
        ]


class Ingresses:
    """Handle of the ingresses: what each time all of them say is in flight."""

    def __init__(self, *counts):
        self.counts, self.asked = list(counts), []

    def broadcast(self, method):
        self.asked.append(method)
        return self

    def results(self, timeout_s, return_exceptions):
        assert (timeout_s, return_exceptions) == (5, True)
        if isinstance(count := self.counts.pop(0), Exception):
            raise count
        return count


@pytest.mark.parametrize(
    ("counts", "asked"),
    [
        ([[0]], 1),
        ([[2, 0], [0, 1], [0, 0], [5]], 3),
        ([[3], TimeoutError(), [0]], 3),
        ([[RuntimeError("it died"), 1], [RuntimeError("it died")]], 2),
        ([[]], 1),
        ([[1]] * 50, 20),
    ],
)
def test_the_gates_stay_closed_until_nothing_is_in_flight_or_the_time_is_over(monkeypatch, counts, asked):
    ingresses, now, ended = Ingresses(*counts), [0.0], []
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: ingresses if names == NAMES else None)
    monkeypatch.setattr(run, "_end_questions", ended.append)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stops_now = SimpleNamespace(is_set=lambda: False, wait=lambda s: now.append(now.pop() + s))
    run.finish_answers(5.9, stops_now)
    assert ingresses.asked == ["close_gate"] * asked and ended == [ingresses]


def test_a_second_signal_ends_the_wait(monkeypatch):
    ingresses, stops_now = Ingresses([1], [1], [1]), threading.Event()
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: ingresses)
    monkeypatch.setattr(run, "_end_questions", lambda handle: None)
    monkeypatch.setattr(run, "SENT_WITHIN_S", 0)
    ingresses.broadcast = lambda method: stops_now.set() or ingresses
    run.finish_answers(600, stops_now)
    assert len(ingresses.counts) == 2


# --------------------------------------------------------------------------------------------------------- ports


def test_a_port_is_claimed_at_its_address_and_free_again():
    port = run._claim_port("127.0.0.1", 0)
    assert run._claim_port("127.0.0.1", port) == port
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(SettingsError) as caught:
            run._claim_port("127.0.0.1", port)
        assert str(caught.value) == (
            f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another port=."
        )
