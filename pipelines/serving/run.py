"""Start and stop the service on a Ray cluster: the one this process is connected to, or a local one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.cluster import check_resources, start_ray
from pipelines.serving.app import APP_NAME, build_app
from pipelines.serving.artifact import check_artifact
from pipelines.serving.clients import KEYS_VARIABLE, key_digests
from pipelines.settings import ServeSettings, SettingsError

logger = logging.getLogger(__name__)

HEALTHY_WITHIN_S = 300
STOPPED_WITHIN_S = 30
ASKED_WITHIN_S = 5.0
SENT_WITHIN_S = 0.3
"""Time in which a finished answer has left the proxy."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.connections:guard_connections",
    # A proxy that died is noticed after three checks.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # One that starts on a busy machine takes longer than Serve's 5 s, after which it would be killed.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
"""Settings of Ray Serve's own processes: they read them from the environment in which Ray was started."""

logging.getLogger("ray.serve").setLevel(logging.WARNING)  # deploy's caller prints the address


class ServingError(ValueError):
    """The service did not start; one sentence says why."""


@contextmanager
def serving(settings: ServeSettings) -> Iterator[str]:
    """Serve while the block runs: Ray is joined or started, and everything that was started here is stopped again.

    Yields:
        The address, e.g. ``http://127.0.0.1:8000``.

    Raises:
        SettingsError: the artifact is missing, or the port is taken.
        ServingError: the model does not load.
    """
    settings = check_settings(settings)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not (settings.ray_address or os.environ.get("RAY_ADDRESS") or ray.is_initialized()):
        _claim_port(settings.host, settings.port)  # told before Ray starts, which takes seconds
    with start_ray(settings):
        replica = {"CPU": settings.cpus_per_replica, "GPU": settings.num_gpus}
        asked = f"cpus_per_replica={settings.cpus_per_replica:g}, num_gpus={settings.num_gpus:g}"
        check_resources(replica, f"serving (num_replicas={settings.num_replicas}, {asked})", settings.num_replicas)
        was_running = serve_address() is not None
        try:
            yield _deploy(settings)
        finally:
            serve.delete(APP_NAME) if was_running else shut_down()


def finish_answers(within_s: float, stops_now: threading.Event) -> None:
    """Let no request in any more, and wait for the answers in flight.

    Args:
        within_s: longest wait, in seconds.
        stops_now: ends the wait.
    """
    ingresses = serve.get_deployment_handle("ingress", APP_NAME)
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and not stops_now.is_set():
        try:
            counts = ingresses.broadcast("close_gate").results(timeout_s=ASKED_WITHIN_S, return_exceptions=True)
        except TimeoutError:  # a busy one; asked again
            continue
        stops_now.wait(SENT_WITHIN_S)
        if not any(count for count in counts if isinstance(count, int)):
            break
    _end_questions(ingresses)


def _end_questions(handle: DeploymentHandle[Any]) -> None:
    """Let a handle ask the controller no more: Ray prints the questions that the controller leaves open at its end."""
    client: Any
    router: Any
    with contextlib.suppress(ImportError, AttributeError):  # Serve's own parts; without them there is a line more
        from ray.serve._private.router import SharedRouterLongPollClient

        client, router = serve.context._get_global_client(), handle._router
        SharedRouterLongPollClient.get_or_create(client._controller, router.event_loop).long_poll_client.stop()
        router._asyncio_router.long_poll_client.stop()


def shut_down() -> None:
    """Stop Ray Serve on this cluster.

    ``serve.shutdown`` leaves a call open on the controller that dies with it, and Ray then prints "graceful_shutdown
    failed". Here the call returns at once, and the controller's end is awaited.
    """
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            break
        time.sleep(0.1)
    client._shutdown = True  # its own call is not needed any more
    serve.shutdown()


def check_settings(settings: ServeSettings) -> ServeSettings:
    """Find the artifact and the API keys before anything is started.

    Raises:
        SettingsError: the artifact is missing, or a source of API keys is empty.
    """
    if not key_digests(settings) and settings.host not in LOOPBACK:
        logger.warning(
            "host=%s is open to other machines and there are no API keys: set %s, api_keys_file= or api_keys.",
            settings.host,
            KEYS_VARIABLE,
        )
    try:
        return settings.model_copy(update={"artifact": check_artifact(settings)})
    except ValueError as error:
        raise SettingsError(str(error)) from error


def deploy(settings: ServeSettings) -> str:
    """Deploy on the Ray cluster of this process and wait until the model answers.

    Another call with another artifact is a rolling update. Serve listens at one address per cluster: where it is
    running, that address stays.

    Returns:
        The address.

    Raises:
        SettingsError: the artifact is missing, the port is taken, or there is no room beside the model that is served.
        ServingError: the model does not load, or does not answer.
    """
    return _deploy(check_settings(settings))


def _deploy(settings: ServeSettings) -> str:
    address = serve_address()
    if address is None:
        port = _claim_port(settings.host, settings.port)
        _start_serve(settings.host, port)
        address = _url(settings.host, port)
    elif settings.port and address != _url(settings.host, settings.port):
        logger.warning("Ray Serve is running at %s; the model is served there.", address)
    _check_room_beside(_num_replicas(), settings)
    try:
        with _unseeded():
            serve.run(build_app(settings), name=APP_NAME, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise ServingError(f"the model did not start: {_reason(error)}") from error
    _wait_until_healthy(address)
    return address


@contextmanager
def _unseeded() -> Iterator[None]:
    """Random numbers that no seed of the caller's repeats: Serve takes a deployment of the same version for unchanged.

    It names versions by Python's generator, which is as it was afterwards.
    """
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def _start_serve(host: str, port: int) -> None:
    options = {"host": host, "port": port}
    try:
        serve.start(http_options=options)
    except (TimeoutError, ray.exceptions.ActorDiedError):
        # Serve stopped waiting for its proxy, which still starts: the model's health shows when it is there.
        logger.warning("Ray Serve takes more than a minute to start on this busy machine; waiting for it.")
        serve.start(http_options=options)


def _num_replicas() -> int:
    """Replicas of the model that is served now."""
    application = serve.status().applications.get(APP_NAME)
    model = application.deployments.get("model") if application else None
    return sum(model.replica_states.values()) if model else 0


def _check_room_beside(num_old: int, settings: ServeSettings) -> None:
    """Raise where a model has no room beside the one that it replaces. On GPUs the old one stops first."""
    if num_old and not settings.num_gpus:
        asked = f"num_replicas={settings.num_replicas}, cpus_per_replica={settings.cpus_per_replica:g}"
        beside = f"beside {num_old} that answer{'s' * (num_old == 1)} until then"
        needed = {"CPU": settings.cpus_per_replica}
        check_resources(needed, f"replacing the served model ({asked}, {beside})", num_old + settings.num_replicas)


def serve_address() -> str | None:
    """Where Ray Serve listens on this cluster; None where it does not run."""
    try:
        options = serve.context._get_global_client(raise_if_no_controller_running=False)
    except RayServeException:
        return None
    return _url(options.http_config.host, options.http_config.port) if options is not None else None


def _claim_port(host: str, port: int) -> int:
    """The port, or a free one for 0, provided that this process could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            key = "host" if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL else "port"
            raise SettingsError(
                f"cannot listen on {host} port {port}: {error.strerror}; choose another {key}=."
            ) from error
        return int(probe.getsockname()[1])


def _url(host: str | None, port: int) -> str:
    """An address that this machine reaches, also where Serve listens on every interface."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host or "0.0.0.0", host)
    return f"http://[{name}]:{port}" if ":" in str(name) else f"http://{name}:{port}"


def _wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}/healthz", timeout=10, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise ServingError(f"{address}/healthz did not become healthy within {HEALTHY_WITHIN_S} s.")


def _reason(error: Exception) -> str:
    """The innermost sentence of Serve's report: the last line that names an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":", 1)[0]]
    return (named or lines or [type(error).__name__])[-1]
