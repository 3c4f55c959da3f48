"""Join or start a Ray cluster; stop only what was started here.

Whoever reaches Ray's ports runs code as the cluster's user. So a cluster that is started here asks for a token and
listens on the loopback interface alone. The token is where Ray itself looks, ``~/.ray/auth_token`` (readable by its
owner only): jobs of the same user find it by themselves, Ray's commands with ``RAY_AUTH_MODE=token``. Clusters
of others are joined as they are: with the token where there is one, with a warning where they ask for none.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from pipelines.settings import Settings, SettingsError
from pipelines.shared_paths import check_shared_paths

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers run in the environment of the driver, also where the driver was started through `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Set before Ray starts, unless the user's environment says otherwise."""

AUTH_MODE = "RAY_AUTH_MODE"
"""Ray's own variable: ``token``, or ``disabled`` as an explicit choice. Where it is not set, tokens are on for a
cluster that is started, and for one that is joined if there is a token."""

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for machines that are no cluster: switched off, all its processes listen on 127.0.0.1."""

_WORKER_SHARES, _NUM_SHARES = "worker_shares", 1_000_000
"""Resource of clusters that are started here; see ``worker_share``."""

_STARTS, _TOO_SLOW = 3, "timed out during startup"
"""Tries to start Ray, and what Ray says where it was too slow."""

_started_here = threading.Event()
"""Set while this process has a cluster of its own."""


def token_path() -> Path:
    """Where Ray looks for the token of this user's clusters."""
    return Path.home() / ".ray" / "auth_token"


def ensure_token(path: Path | None = None) -> None:
    """Have a token that only this user can read: make one where there is none, and take others' rights from a file.

    Args:
        path: of the file; None is Ray's default, unless the environment names another token.
    """
    if path is None and any(os.environ.get(name) for name in _TOKEN_VARIABLES):
        return
    path = path or token_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_once(path, secrets.token_hex(32))
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            path.chmod(0o600)
    except OSError as error:  # no home folder to write to: a token for this process and its children
        folder = tempfile.mkdtemp(prefix="ray-token-")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(folder, "auth_token"))
        _write_once(Path(folder, "auth_token"), secrets.token_hex(32))
        logger.warning("the Ray token cannot be kept in %s (%s); it is in %s", path, error, folder)


def _write_once(path: Path, text: str) -> None:
    """Write a private file whole, unless it is there: of several processes one wins."""
    if path.exists():
        return
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".auth_token")  # mode 0600
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        Path(draft).unlink(missing_ok=True)


def quiet_ray_data() -> ray.data.DataContext:
    """Ray Data's context, its own bars and execution plans switched off: ours count rows, its file keeps the rest."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that they are off
    _actor_arguments_by_value()
    return context


def _actor_arguments_by_value() -> None:
    """Let Ray Data's actors carry their constructor's arguments, which are small here, instead of references to them.

    Ray prints an error line for each actor that it may restart and whose arguments are in the object store
    (github.com/ray-project/ray/issues/53727). With the values in the request, a restart needs no stored object.
    """
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    for reference, value in (("_map_transformer_ref", "_map_transformer"), ("_data_context_ref", "data_context")):
        if hasattr(ActorPoolMapOperator, reference):  # another release of Ray may have other names
            setattr(ActorPoolMapOperator, reference, property(attrgetter(value)))


@contextmanager
def start_ray(settings: Settings) -> Iterator[None]:
    """Have a Ray cluster while the block runs.

    A cluster that this process is connected to is used as it is. Otherwise ``settings.ray_address`` (or the
    environment's ``RAY_ADDRESS``, which Ray sets inside submitted jobs) is joined, and without one a local cluster is
    started, which is stopped when the block ends.

    Args:
        settings: uses ``ray_address``, ``ray_loopback``, ``num_cpus``, ``object_store_mb``, ``quiet``.

    Raises:
        SettingsError: no cluster answers at the address, it asks for another token, or one of its nodes does not see
            a local path of the settings.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address and _IN_A_JOB in os.environ:
        os.environ.setdefault(AUTH_MODE, "disabled")  # a cluster with tokens says so to its jobs
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray's own warning has five lines; ours has one.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with _join(address) if address else _start(settings):
        if address:
            check_shared_paths(settings)
        yield


def check_resources(each: Mapping[str, float], what: str, count: int = 1) -> None:
    """Raise where work could wait for ever: a cluster that was started here does not grow. Of others it is only told.

    Args:
        each: Ray's resources that one process of the work holds, e.g. ``{"CPU": 1, "GPU": 1}``.
        what: the work and its settings, e.g. ``training (num_workers=2, use_gpu=true)``.
        count: processes that must run at a time.

    Raises:
        SettingsError: the cluster lacks them, or has them on no single node.
    """
    lacks = lacking({kind: need * count for kind, need in each.items()}) or _no_node_with(each)
    if not lacks:
        return
    if not is_own_cluster():
        logger.warning("%s needs %s: waiting for nodes to join the Ray cluster.", what, lacks)
        return
    raise SettingsError(
        f"{what} needs {lacks}: ask for less, or give the cluster that has them as ray_address=HOST:PORT."
    )


def lacking(needs: Mapping[str, float]) -> str:
    """What the cluster lacks, as part of a sentence: ``8 CPUs, and 4 are there``; empty where it has all."""
    import ray

    there = ray.cluster_resources()
    return "; ".join(
        f"{need:g} {kind}s, and {there.get(kind, 0):g} are there"
        for kind, need in needs.items()
        if need > there.get(kind, 0)
    )


def _no_node_with(each: Mapping[str, float]) -> str:
    """The same for what one node must have."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(kind, 0) >= need for kind, need in each.items()) for node in nodes):
        return ""
    return (
        f"{' and '.join(f'{need:g} {kind}s' for kind, need in each.items() if need)} on one node, and no node has them"
    )


def is_own_cluster() -> bool:
    """Whether this process has started the Ray cluster, which then does not grow."""
    return _started_here.is_set()


def worker_share(count: int) -> dict[str, float]:
    """Ray resources of which ``count`` tasks take all, so that Ray itself never runs more of them at a time.

    Empty where this process did not start the cluster: there the resource is missing, or held by the task that asks.
    """
    return {_WORKER_SHARES: _NUM_SHARES // count} if _started_here.is_set() else {}


@contextmanager
def _join(address: str) -> Iterator[None]:
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray's command line does
    is_here = address.rpartition(":")[0] in _LOOPBACK_HOSTS
    try:
        # Elsewhere than here, a driver on loopback would give an address that the cluster is not at.
        with _sigterm_handler_kept(), _loopback() if is_here else nullcontext():
            ray.init(address=address, **_quiet_workers())
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        mode = os.environ.get(AUTH_MODE, "disabled")
        raise SettingsError(
            f"no Ray cluster answers at ray_address={address!r}, or it takes another token than this process has "
            f"({AUTH_MODE}={mode}): start one with `ray start --head`, give the cluster's token in {token_path()}, or, "
            f"for a cluster without tokens, set {AUTH_MODE}=disabled."
        ) from error
    if os.environ.get(AUTH_MODE, "disabled").lower() != "token":
        _warn_without_token(f"the Ray cluster at {address}")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _start(settings: Settings) -> Iterator[None]:
    import ray

    if os.environ.get(AUTH_MODE, "token").lower() == "token":
        ensure_token()
    else:
        _warn_without_token(f"this Ray cluster ({AUTH_MODE}={os.environ[AUTH_MODE]})")
    with _loopback() if settings.ray_loopback else _every_interface():
        with _sigterm_handler_kept():
            _init_with_patience(_init_arguments(settings))
        _started_here.set()
        try:
            yield
        finally:
            _started_here.clear()
            ray.shutdown()


def _init_with_patience(arguments: _InitArguments) -> None:
    """Start Ray; on a busy machine it gives up its own start after 30 s, and is asked again."""
    import ray

    for tries_left in reversed(range(_STARTS)):
        try:
            ray.init(**arguments)
            return
        except Exception as error:  # Ray's own has no other type
            if not tries_left or _TOO_SLOW not in str(error):
                raise
            logger.warning("Ray did not start within 30 s on this busy machine; it is started again.")


@contextmanager
def _loopback() -> Iterator[None]:
    """Have what is started in the block, and its processes, be at 127.0.0.1 alone."""
    from ray._private import ray_constants

    before = os.environ.get(_LOOPBACK_VARIABLE)
    os.environ[_LOOPBACK_VARIABLE] = "0"
    switch = ray_constants.ENABLE_RAY_CLUSTER  # read when Ray was imported
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = switch
        if before is None:
            os.environ.pop(_LOOPBACK_VARIABLE, None)
        else:
            os.environ[_LOOPBACK_VARIABLE] = before


@contextmanager
def _every_interface() -> Iterator[None]:
    logger.warning("ray_loopback=false: Ray's ports listen on the network; whoever has the token runs code here.")
    yield


def _warn_without_token(what: str) -> None:
    logger.warning("%s asks for no token: whoever reaches its ports can run code as its user and read its keys.", what)


class _Quiet(TypedDict):
    """Arguments of ``ray.init`` that decide what is printed."""

    logging_level: int
    log_to_driver: bool


class _InitArguments(_Quiet):
    """Arguments of ``ray.init`` for a cluster that it starts."""

    address: str
    include_dashboard: bool
    resources: dict[str, float]
    num_cpus: NotRequired[int]
    object_store_memory: NotRequired[int]


def _quiet_workers() -> _Quiet:
    """What workers print is for debugging (Ray keeps it in its session folder); progress comes by our own lines."""
    return {"logging_level": logging.WARNING, "log_to_driver": "TINYGPTV_RAY_LOGS" in os.environ}


@contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """Keep the process's own handler of SIGTERM: the one that Ray sets prints a stack of addresses."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


def _init_arguments(settings: Settings) -> _InitArguments:
    """Arguments of ``ray.init`` for a cluster that it starts."""
    quiet = _quiet_workers()
    # The dashboard's eight processes are for clusters that stay: `ray start --head` has it.
    arguments: _InitArguments = {
        "address": "local",
        "include_dashboard": False,
        "resources": {_WORKER_SHARES: _NUM_SHARES},
        "logging_level": quiet["logging_level"],
        "log_to_driver": quiet["log_to_driver"],
    }
    if settings.num_cpus:
        arguments["num_cpus"] = settings.num_cpus
    if settings.object_store_mb:
        arguments["object_store_memory"] = settings.object_store_mb * 2**20
    return arguments
