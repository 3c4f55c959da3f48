"""Between ingress and replicas: what a dead or full replica costs, and what the deployments ask of Ray Serve."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from pipelines.serving import app as app_module
from pipelines.serving.api import build_api
from pipelines.serving.app import HandleBackend, Ingress, LostProxyIsDisconnect, ModelReplica, build_app
from pipelines.serving.backend import ChatJob, Failure, ModelInfo, Piece, PromptRead, ReplicaStats
from pipelines.serving.clients import digest_of
from pipelines.serving.errors import ProtocolError
from pipelines.serving.metrics import Metrics, render
from pipelines.settings import ServeSettings, SettingsError
from tests.serving_api import CHAT, FakeBackend
from tinygptv.data.conversation import ChatMessage

JOB = ChatJob((ChatMessage("user", "hi", ()),), {})
READ, A, END = PromptRead(3), Piece("a"), Piece("b", finish_reason="stop")
DIED = WorkerCrashedError()
UNAVAILABLE = ReplicaUnavailableError("it is shutting down")
FULL = BackPressureError(num_queued_requests=1, max_queued_requests=1)
CROWDED, GONE = (429, "rate_limit_exceeded"), (503, "unavailable")


class Stream:
    """One replica's items; an exception among them is raised there."""

    def __init__(self, items):
        self.items, self.cancelled = items, False

    async def __aiter__(self):
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    def __await__(self):
        async def result():
            if isinstance(self.items, Exception):
                raise self.items
            return self.items

        return result().__await__()

    def cancel(self):
        self.cancelled = True


class Handle:
    """Ray Serve's handle: each call gets the next of the given outcomes."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls, self.opened, self.asked = list(outcomes), [], [], []

    def options(self, **options):
        self.calls.append(options)
        return self

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self.remote(method, arguments))

    def remote(self, method, arguments):
        self.asked.append((method, arguments))
        self.opened.append(Stream(self.outcomes.pop(0)))
        return self.opened[-1]

    def broadcast(self, method):
        self.calls.append(method)
        return self

    async def results_async(self, return_exceptions):
        assert return_exceptions
        return self.outcomes


def run(*outcomes, method="stream"):
    """Items or result, or (status, code) of the refusal; the handle; and how often another replica was tried."""
    metrics, handle = Metrics(), Handle(*outcomes)
    backend = HandleBackend(handle, metrics)

    async def collect():
        found = []
        try:
            if method != "stream":
                return await getattr(backend, method)(*([JOB] if method == "complete" else []))
            async for item in backend.stream(JOB):
                found.append(item)
        except ProtocolError as error:
            found.append((error.status, error.code))
        return found

    found = asyncio.run(collect())
    return found, handle, metrics.registry.get_sample_value("tinygptv_retries_total")


@pytest.mark.parametrize(
    ("replicas", "items", "retries"),
    [
        ([[READ, A, END]], [READ, A, END], 0),
        ([[READ, DIED], [READ, A, END]], [READ, A, END], 1),
        ([[DIED], [READ, A, END]], [READ, A, END], 1),
        ([[UNAVAILABLE], [READ, A, END]], [READ, A, END], 1),
        ([[READ, ActorDiedError()], [A, END]], [READ, A, END], 1),
        ([[READ, DIED], [READ, DIED]], [READ, GONE], 2),
        ([[FULL]], [CROWDED], 0),
        ([[READ, DIED], [FULL]], [READ, CROWDED], 1),
    ],
)
def test_another_replica_takes_over_before_the_first_text(replicas, items, retries):
    found, handle, tried = run(*replicas)
    assert (found, tried) == (items, retries) and len(handle.opened) == len(replicas)
    assert all(stream.cancelled for stream in handle.opened), "whatever is left of it ends"
    assert handle.calls == [{"session_id": JOB.conversation, "stream": True}]


def test_a_stream_with_text_ends_with_its_replica():
    found, handle, tried = run([READ, A, Piece(""), DIED], [READ, A, END])
    assert found.pop(2) == Piece("")
    assert found[:2] == [READ, A] and isinstance(found[2], Failure) and found[2].kind == "unavailable"
    assert len(found) == 3 and len(handle.opened) == 1 and tried == 0


@pytest.mark.parametrize(
    ("outcomes", "expected", "retries"),
    [
        ([[READ, END]], [READ, END], 0),
        ([DIED, [READ, END]], [READ, END], 1),
        ([DIED, DIED, [READ, END]], [GONE], 2),
        ([FULL], [CROWDED], 0),
    ],
)
def test_whole_answers_are_tried_on_two_replicas(outcomes, expected, retries):
    found, handle, tried = run(*outcomes, method="complete")
    assert (found, tried) == (expected, retries) and handle.calls == [{"session_id": JOB.conversation}]


def test_metadata_comes_from_any_replica():
    info = ModelInfo(16, 100, 1)
    assert run(DIED, info, method="describe")[0] == info


@pytest.mark.parametrize(("results", "healthy"), [([None], True), ([DIED, None], True), ([DIED], False), ([], False)])
def test_one_healthy_replica_is_enough(results, healthy):
    backend = HandleBackend(Handle(*results), Metrics())
    if healthy:
        return asyncio.run(backend.check_health())
    with pytest.raises((WorkerCrashedError, ProtocolError)):
        asyncio.run(backend.check_health())


def test_counters_of_replicas_that_answer():
    one, two = ReplicaStats("1", "a", {}), ReplicaStats("2", "b", {})
    assert run([one], DIED, [two], method="stats")[0] == [one, two]


# ---------------------------------------------------------------------- deployments


def deployments(**settings):
    """Options of the ingress and of the replicas."""
    ingress = build_app(ServeSettings(artifact="x", **settings))._bound_deployment
    (model,) = [arg._bound_deployment for arg in ingress.init_args if hasattr(arg, "_bound_deployment")]
    return ingress, model


def test_replicas_get_what_the_settings_say():
    bounds = {"max_batch_size": 4, "max_queue": 10, "request_timeout_s": 30}
    ingress, model = deployments(**bounds, num_ingresses=2, cpus_per_replica=3)
    assert (ingress.num_replicas, model.num_replicas) == (2, 1)
    assert (model.max_ongoing_requests, model.max_queued_requests) == (8, 28)
    assert model.ray_actor_options["num_cpus"] == 3 and ingress.ray_actor_options["num_cpus"] == 0
    assert ingress.ray_actor_options["runtime_env"] == {"env_vars": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
    config = model._deployment_config
    assert config.graceful_shutdown_timeout_s == 30 and config.autoscaling_config is None
    assert config.max_surge_percent == ingress._deployment_config.max_surge_percent == 100
    assert ingress._deployment_config.graceful_shutdown_timeout_s == 30, "answers in flight are finished"


@pytest.mark.parametrize(
    ("num", "most", "scales"), [(1, 0, False), (1, 1, False), (2, 0, False), (2, 2, False), (1, 2, True), (2, 5, True)]
)
def test_replicas_scale_up_to_their_most(num, most, scales):
    config = deployments(num_replicas=num, max_replicas=most, max_batch_size=4)[1]._deployment_config
    found = config.autoscaling_config
    if not scales:
        assert found is None and config.num_replicas == num
    else:
        assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (num, most, 4)
    chosen = config.request_router_config.request_router_class
    assert ("ConsistentHash" in str(chosen)) == (max(num, most) > 1), "turns of a conversation go to the same replica"


def test_on_a_gpu_the_old_replica_stops_first():
    model = deployments(num_gpus=1)[1]
    assert model._deployment_config.max_surge_percent == 0 and model.ray_actor_options["num_gpus"] == 1


@pytest.mark.parametrize(("artifact", "kept"), [("x", ""), ("models:/name@best", "http://server:5000")])
def test_replicas_know_the_registry_only_where_the_model_comes_from_it(artifact, kept):
    app = build_app({"artifact": artifact, "tracking_uri": "http://server:5000"})
    assert app._bound_deployment.init_args[0].tracking_uri == kept


@pytest.mark.parametrize("error", [TaskCancelledError(), ActorDiedError()])
def test_a_client_that_leaves_before_its_body_is_read_is_no_error_of_the_server(error):
    metrics, sent = Metrics(), []
    app = build_api(ServeSettings(), FakeBackend(), metrics)
    app.add_middleware(LostProxyIsDisconnect)

    async def receive():
        raise error

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "query_string": b"", "client": ("::1", 1)}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert 'tinygptv_requests_total{status="499"} 1.0' in render([metrics.snapshot()], []).decode()


# ---------------------------------------------------------------------- what is asked of whom


def test_the_job_reaches_the_replicas_method_as_it_is():
    for method, outcome in (("stream", [READ, END]), ("complete", [READ, END])):
        handle = run([DIED] if method == "stream" else DIED, outcome, method=method)[1]
        assert handle.asked == [(method, (JOB,))] * 2
    handle = run(ModelInfo(1, 2, 3), method="describe")[1]
    assert handle.asked == [("describe", ())]
    for method, outcome in (("stats", []), ("check_health", None)):
        assert run(outcome, method=method)[1].calls == [method]


def test_what_is_wrong_with_no_replica_is_told():
    with pytest.raises(WorkerCrashedError):
        run(DIED, ProtocolError(400, "second"), method="check_health")
    assert run(method="check_health")[0] == [GONE]
    assert run(ValueError("bug"), [], method="stats")[0] == []


def test_an_error_of_the_request_is_not_tried_on_another_replica():
    with pytest.raises(ValueError, match="bug"):
        run([READ, ValueError("bug")])
    with pytest.raises(ValueError, match="bug"):
        run(ValueError("bug"), method="complete")


def test_a_full_queue_says_when_to_come_back():
    backend = HandleBackend(Handle([FULL]), Metrics())

    async def ask():
        return [item async for item in backend.stream(JOB)]

    with pytest.raises(ProtocolError) as caught:
        asyncio.run(ask())
    assert caught.value.message == "every replica is busy and the queue is full; try again soon."
    assert caught.value.retry_after_s == 2


def test_an_empty_piece_is_no_text_yet_and_the_prompt_is_read_once():
    empty = Piece("", 1)
    found, handle, tried = run([READ, empty, DIED], [PromptRead(9), A, END])
    assert (found, tried, len(handle.opened)) == ([READ, empty, A, END], 1, 2)


def test_a_caller_that_leaves_ends_the_replicas_call():
    backend, opened = HandleBackend(Handle([READ, A, END]), Metrics()), []

    async def leave():
        async with aclosing(backend.stream(JOB)) as items:
            await anext(items)
        waiting = Waiting()
        handle = Handle()
        handle.remote = lambda *_: waiting
        task = asyncio.create_task(HandleBackend(handle, Metrics()).complete(JOB))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        opened.append(waiting)

    asyncio.run(leave())
    assert backend.handle.opened[0].cancelled and opened[0].cancelled


class Waiting(Stream):
    """A call without an answer."""

    def __init__(self):
        super().__init__([])

    def __await__(self):
        return asyncio.sleep(60).__await__()


def test_deployments_have_their_names_their_arguments_and_quiet_logs(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    ingress, model = deployments(api_keys=["key"], num_gpus=0.5, model_name="name")
    assert (ingress.name, model.name) == ("ingress", "model")
    settings, digests, _ = ingress.init_args
    assert digests == (digest_of("key"),) and settings.api_keys == [] and settings.model_name == "name"
    assert model.init_args == (settings,) and model.func_or_class.__name__ == "ModelReplica"
    assert ingress.max_ongoing_requests == 100_000 and model._deployment_config.health_check_period_s == 5
    assert model.ray_actor_options["num_gpus"] == 0.5 and model.ray_actor_options["runtime_env"] == {}
    for policy in ("PASSIVE", "ACTIVE"):
        assert deployments()[1].ray_actor_options["runtime_env"]["env_vars"] == {"OMP_WAIT_POLICY": policy}
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # whoever starts the service may choose
    for each in (ingress, model):
        assert each._deployment_config.logging_config["enable_access_log"] is False


def test_a_wrong_key_of_a_serve_configuration_is_named():
    with pytest.raises(SettingsError, match=r"the Serve configuration's args: .*artefact"):
        build_app({"artefact": "x"})


# ---------------------------------------------------------------------- several ingresses


def plain_ingress(**fields):
    """An ingress without Ray Serve's wrapper."""
    kind = Ingress.__bases__[0]
    made = kind.__new__(kind)
    vars(made).update(fields)
    return made


class Ingresses:
    """Ray Serve as an ingress sees it: its own name, and the others' answers."""

    def __init__(self, monkeypatch, *results):
        self.results, self.asked = results, []
        context = SimpleNamespace(replica_tag="tag-1", deployment="ingress", app_name="app")
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: self.asked.append(names) or self)
        self.own = plain_ingress(metrics=Metrics())

    def broadcast(self, method):
        self.asked.append(method)
        return self

    async def results_async(self, return_exceptions):
        assert return_exceptions
        return list(self.results)


def test_counters_of_every_ingress_that_answers_are_shown(monkeypatch):
    others = [Metrics().snapshot("a"), DIED, Metrics().snapshot("b")]
    ray = Ingresses(monkeypatch, *others)
    assert asyncio.run(ray.own._metrics_of_all_ingresses()) == [others[0], others[2]]
    assert ray.asked == [("ingress", "app"), "own_metrics"]
    alone = Ingresses(monkeypatch, DIED)
    assert [found.ingress for found in asyncio.run(alone.own._metrics_of_all_ingresses())] == ["tag-1"]


@pytest.fixture
def own_handlers(monkeypatch):
    """Loggers whose handlers are as before after the test."""
    loggers = [logging.getLogger(name) for name in ("pipelines", "tinygptv", "ray.serve")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [])
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("own_handlers")
def test_an_ingress_keeps_what_it_is_given_and_counts_for_itself():
    one, two = (Ingress.__bases__[0]("settings", "digests", "model") for _ in range(2))
    assert (one.settings, one.digests, one.model) == ("settings", "digests", "model")
    assert isinstance(one.metrics, Metrics) and one.metrics is not two.metrics


@pytest.mark.parametrize("make", [lambda: Ingress.__bases__[0](None, (), None), lambda: ModelReplica(None)])
def test_what_a_replica_logs_is_in_the_file_of_ray_serve(monkeypatch, own_handlers, make):
    monkeypatch.setattr(app_module.ModelBackend, "__init__", lambda self, settings: None)
    make()
    kept, handler = [], logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    logging.getLogger("ray.serve").addHandler(handler)  # as Serve does where its settings change
    logging.getLogger("pipelines.serving.body").info("ignored")
    logging.getLogger("tinygptv.inference.engine").info("failed")
    assert kept == ["ignored", "failed"]


def test_a_replica_that_dies_is_told_in_the_log(caplog):
    run([DIED], [READ, END])
    run([READ, A, DIED])
    run(DIED, [READ, END], method="complete")
    streamed = "a replica died while it streamed: WorkerCrashedError"
    assert caplog.messages == [streamed, streamed, "a replica died, trying another one: WorkerCrashedError"]


def test_an_ingress_counts_what_its_backend_retries(monkeypatch):
    """One set of counters: that of the API is that of the calls to replicas."""
    made, gate = {}, SimpleNamespace(is_closed=False, in_flight=3)

    def build(settings, backend, metrics, **options):
        made.update(settings=settings, backend=backend, metrics=metrics, **options)
        made["app"] = SimpleNamespace(
            add_middleware=lambda kind: made.update(middleware=kind), state=SimpleNamespace(gate=gate)
        )
        return made["app"]

    monkeypatch.setattr(app_module, "build_api", build)
    ingress = plain_ingress(settings="settings", digests="digests", model="model", metrics=Metrics())
    assert ingress.__serve_build_asgi_app__() is made["app"]
    assert (made["settings"], made["digests"], made["backend"].handle) == ("settings", "digests", "model")
    assert made["metrics"] is made["backend"].metrics is ingress.metrics
    assert made["all_metrics"] == ingress._metrics_of_all_ingresses and made["middleware"] is LostProxyIsDisconnect
    assert ingress.close_gate() == 3 and gate.is_closed


def test_other_messages_than_requests_pass_to_the_application_as_they_come():
    given = []

    async def app(scope, receive, send):
        given.append((scope["type"], receive))

    async def receive():
        return {"type": "lifespan.startup"}

    asyncio.run(LostProxyIsDisconnect(app)({"type": "lifespan"}, receive, None))
    assert given == [("lifespan", receive)]
