"""Join or start a Ray cluster; stop only what was started here.

Token authentication: Ray turns it on by itself where ``RAY_AUTH_MODE`` is unset and then refuses processes that were
started without it, so every process of ours says explicitly what it uses.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipelines.settings import Settings, SettingsError

if TYPE_CHECKING:
    import ray.data

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers run in the environment of the driver, also where the driver was started through `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
"""Set before Ray starts, unless the user's environment says otherwise."""


def quiet_ray_data() -> ray.data.DataContext:
    """Ray Data's context, its own bars and execution plans switched off: ours count rows, its file keeps the rest."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that they are off
    return context


@contextmanager
def start_ray(settings: Settings) -> Iterator[None]:
    """Have a Ray cluster while the block runs.

    A cluster that this process is connected to is used as it is. Otherwise ``settings.ray_address`` (or the
    environment's ``RAY_ADDRESS``, which Ray sets inside submitted jobs) is joined, and without one a local cluster is
    started, which is stopped when the block ends.

    Args:
        settings: uses ``ray_address``, ``num_cpus``, ``object_store_mb``, ``quiet``.

    Raises:
        SettingsError: no cluster answers at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(**_init_arguments(settings))
    except ConnectionError as error:
        address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
        raise SettingsError(
            f"no Ray cluster answers at ray_address={address!r}: start one with `ray start --head`, or leave it empty."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of ``ray.init``; sizes apply only to a cluster that it starts."""
    # What workers print is for debugging (Ray keeps it in its session folder); progress comes through our own lines.
    common = {"logging_level": logging.WARNING, "log_to_driver": "TINYGPTV_RAY_LOGS" in os.environ}
    address = settings.ray_address or os.environ.get("RAY_ADDRESS", "")
    if address:
        return {"address": address, **common}
    # The dashboard's eight processes are for clusters that stay: `ray start --head` has it.
    arguments: dict[str, Any] = {"address": "local", "include_dashboard": False, **common}
    if settings.num_cpus:
        arguments["num_cpus"] = settings.num_cpus
    if settings.object_store_mb:
        arguments["object_store_memory"] = settings.object_store_mb * 2**20
    return arguments
