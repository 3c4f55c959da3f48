"""Ray Serve: an ingress that speaks HTTP, and replicas that run the model.

The ingress is a light process (no torch): it checks keys, bodies and images, and gives what is left to a replica.
When a replica dies, requests that have shown no text yet go to another one; streams end with an error event. A new
artifact is deployed by starting its replicas before the old ones stop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, TaskCancelledError, WorkerCrashedError
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.api import build_api
from pipelines.serving.backend import ChatJob, Failure, Item, ModelInfo, Piece, PromptRead, ReplicaStats
from pipelines.serving.clients import key_digests
from pipelines.serving.errors import model_unavailable, too_busy
from pipelines.serving.gate import Gate
from pipelines.serving.line import AT_MODEL
from pipelines.serving.metrics import IngressMetrics, Metrics
from pipelines.serving.model_backend import ModelBackend
from pipelines.settings import ServeSettings

logger = logging.getLogger(__name__)

APP_NAME = "tinygptv"
TRIES = 2
"""Replicas that a request is tried on: one that dies may have been unlucky, two have been killed by the request."""

REPLICA_DIED = (RayActorError, WorkerCrashedError, ReplicaUnavailableError)

WAIT_POLICY = "OMP_WAIT_POLICY"
"""OpenMP's variable: whether threads that wait spin (``ACTIVE``) or sleep (``PASSIVE``)."""

MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable: larger blocks go back to the system when they are freed. It raises its own 128 kB as blocks are
freed, and keeps those of request bodies: after 360 bodies of 13 MB an ingress held 1.2 GB, and 0.5 with it fixed."""

AFFINITY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Sends the turns of a conversation to the replica that has its image and history; the next if that is full."""


class HandleBackend:
    """``Backend`` over Ray Serve."""

    def __init__(self, handle: DeploymentHandle[Any], metrics: Metrics) -> None:
        self.handle = handle
        self.metrics = metrics

    async def describe(self) -> ModelInfo:
        """Metadata of the model."""
        info: ModelInfo = await self._call(self.handle.describe)
        return info

    async def complete(self, job: ChatJob) -> list[Item]:
        """The whole answer."""
        items: list[Item] = await self._call(self.handle.options(session_id=job.conversation).complete, job)
        return items

    async def stream(self, job: ChatJob) -> AsyncGenerator[Item, None]:
        """The answer as it grows; until the first text has come, another replica may take over."""
        handle = self.handle.options(session_id=job.conversation, stream=True)
        was_read = has_text = False
        for _ in range(TRIES):
            items = handle.stream.remote(job)
            try:
                async for item in items:
                    has_text = has_text or (isinstance(item, Piece) and bool(item.text))
                    if isinstance(item, PromptRead):
                        if was_read:  # told by the replica before
                            continue
                        was_read = True
                    yield item
                return
            except BackPressureError:
                raise _full() from None
            except REPLICA_DIED as error:
                logger.warning("a replica died while it streamed: %s", type(error).__name__)
                if has_text:
                    yield Failure("the model's replica stopped in the middle of the answer.", "unavailable")
                    return
                self.metrics.retries.inc()
            finally:
                items.cancel()
        raise model_unavailable()

    async def stats(self) -> list[ReplicaStats]:
        """Counters of each replica."""
        return [stats for result in await self._ask_all("stats") if isinstance(result, list) for stats in result]

    async def check_health(self) -> None:
        """Raises where no replica can answer."""
        results = await self._ask_all("check_health")
        if not any(result is None for result in results):
            raise results[0] if results else model_unavailable()

    async def _ask_all(self, method: str) -> list[Any]:
        """Results of a method of every replica, exceptions among them."""
        results: list[Any] = await self.handle.broadcast(method).results_async(return_exceptions=True)
        return results

    async def _call(self, method: DeploymentHandle[Any], *args: Any) -> Any:
        for _ in range(TRIES):
            response = method.remote(*args)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                raise _full() from None
            except REPLICA_DIED as error:
                logger.warning("a replica died, trying another one: %s", type(error).__name__)
                self.metrics.retries.inc()
        raise model_unavailable()


def _full() -> Exception:
    return too_busy("every replica is busy and the queue is full; try again soon.", 2)


class ModelReplica(ModelBackend):
    """A replica of the model."""

    def __init__(self, settings: ServeSettings) -> None:
        """Load the model (``ModelBackend``)."""
        log_with_serve()
        super().__init__(settings)


def log_with_serve() -> None:
    """Have our loggers write to Serve's file of this process, with time and request; else it has nothing of theirs."""
    for package in ("pipelines", "tinygptv"):
        log = logging.getLogger(package)
        log.handlers = logging.getLogger(SERVE_LOGGER_NAME).handlers  # the list itself: Serve may refill it
        log.setLevel(logging.INFO)


class LostProxyIsDisconnect:
    """A client that leaves may end the proxy's call for its body before it runs: Serve then raises Ray's error where
    ASGI has a message."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def receive_or_disconnect() -> Message:
            try:
                return await receive()
            except (TaskCancelledError, RayActorError):
                return {"type": "http.disconnect"}

        await self.app(scope, receive_or_disconnect if scope["type"] == "http" else receive, send)


@serve.ingress()
class Ingress:
    """The HTTP side."""

    def __init__(self, settings: ServeSettings, digests: Sequence[bytes], model: DeploymentHandle[Any]) -> None:
        """Keep what ``__serve_build_asgi_app__`` needs.

        Args:
            settings: without API keys.
            digests: of the API keys.
            model: the replicas.
        """
        log_with_serve()
        self.settings, self.digests, self.model = settings, digests, model
        self.metrics = Metrics()

    def __serve_build_asgi_app__(self) -> FastAPI:
        backend = HandleBackend(self.model, self.metrics)
        app = build_api(
            self.settings, backend, self.metrics, digests=self.digests, all_metrics=self._metrics_of_all_ingresses
        )
        app.add_middleware(LostProxyIsDisconnect)
        self.gate: Gate = app.state.gate
        return app

    def close_gate(self) -> int:
        """Let no request in any more; how many are in flight."""
        self.gate.is_closed = True
        return self.gate.in_flight

    def own_metrics(self) -> IngressMetrics:
        """Counters of this ingress, for another one to show."""
        return self.metrics.snapshot(serve.get_replica_context().replica_tag)

    async def _metrics_of_all_ingresses(self) -> list[IngressMetrics]:
        context = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        results = await ingresses.broadcast("own_metrics").results_async(return_exceptions=True)
        found = [result for result in results if isinstance(result, IngressMetrics)]
        return found or [self.own_metrics()]


def _replica_environment(settings: ServeSettings) -> dict[str, dict[str, str]]:
    """Ray's runtime environment of a replica. On a CPU its threads sleep while they wait for each other: threads that
    spin cost a replica fourteen times its step where others use its cores (benchmarks/results/cpu_decode.md)."""
    if settings.num_gpus:
        return {}
    # Read when torch is loaded, so it has to be in the environment of the process.
    return {"env_vars": {WAIT_POLICY: os.environ.get(WAIT_POLICY, "PASSIVE")}}


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """How many replicas, and how requests are shared out among several."""
    is_one = max(settings.num_replicas, settings.max_replicas) == 1
    router = RequestRouterConfig(request_router_class=AFFINITY)  # type: ignore[arg-type]
    routing = {} if is_one else {"request_router_config": router}
    if settings.max_replicas <= settings.num_replicas:
        return {"num_replicas": settings.num_replicas, **routing}
    scaling = AutoscalingConfig(
        min_replicas=settings.num_replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.max_batch_size,
    )
    return {"autoscaling_config": scaling, **routing}


def build_app(settings: ServeSettings | dict[str, Any]) -> serve.Application:
    """The Serve application; ``import_path`` of Serve configurations.

    Args:
        settings: or a mapping of its keys, as in the ``args`` of a Serve configuration.

    Raises:
        SettingsError: a setting is wrong, or a source of API keys is empty.
    """
    if isinstance(settings, dict):
        settings = ServeSettings.parse(settings, "the Serve configuration's args")
    digests = key_digests(settings)
    # Ray shows an actor's arguments to whoever may look at the cluster: no keys, and no password of the registry's URI.
    needs_registry = settings.artifact.startswith("models:/")
    settings = settings.model_copy(
        update={"api_keys": [], "tracking_uri": settings.tracking_uri if needs_registry else ""}
    )
    quiet = LoggingConfig(enable_access_log=False)
    model = serve.deployment(
        ModelReplica,
        name="model",
        max_ongoing_requests=AT_MODEL * settings.max_batch_size,
        max_queued_requests=2 * (settings.max_queue + settings.max_batch_size),
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.num_gpus,
            "runtime_env": _replica_environment(settings),
        },
        # A replacement needs the memory of a second model; on one GPU there is none, so there the old one stops first.
        max_surge_percent=0 if settings.num_gpus else 100,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        health_check_period_s=5,
        logging_config=quiet,
        **_replicas(settings),
    )
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=settings.num_ingresses,
        max_ongoing_requests=100_000,  # its own gate refuses, in OpenAI's shape
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": {MMAP_THRESHOLD: str(2**17)}}},
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.request_timeout_s,
        logging_config=quiet,
    )
    return ingress.bind(settings, digests, model.bind(settings))
