"""Local paths on a cluster of several nodes: every node must see what a job reads and writes."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import storage
from pipelines.settings import Settings, SettingsError

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

INPUT_KEYS = ("data", "input", "images", "init_from", "checkpoint", "artifact", "benchmark_data")
"""Settings that may be a local path that workers read."""

_OUTPUT_KEYS = ("output", "storage_path")
_PROBE_TIMEOUT_S = 60.0


def check_shared_paths(settings: Settings) -> None:
    """Ask every other node of the joined cluster whether it sees the local paths of these settings.

    A node that does not answer within a minute is passed over: it may be coming or going.

    Args:
        settings: those of a job; keys that it lacks, URIs and patterns are passed over.

    Raises:
        SettingsError: a node does not see a path; names the key, the path, the node and the fix.
    """
    given = {key: str(getattr(settings, key, "") or "") for key in (*INPUT_KEYS, *_OUTPUT_KEYS)}
    paths = {
        key: Path(value.removeprefix("file://")).expanduser()
        for key, value in given.items()
        if value and storage.is_local(value)
    }
    paths = {key: path for key, path in paths.items() if path.is_absolute()}
    nodes = _other_nodes() if paths else {}
    if not nodes:
        return
    with _marked(paths) as seen_here:
        for address, missing in _missing_on(nodes, seen_here).items():
            for key in missing:
                raise SettingsError(
                    f"{key}={given[key]} is a path of this machine that the node at {address} does not see: give a URI "
                    "that all nodes reach (s3://bucket/..), or a folder that every node mounts at the same path."
                )


def _other_nodes() -> dict[str, str]:
    """Address -> identifier of the alive nodes that run work, without the driver's own."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeManagerAddress"]: node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0) > 0
    }


@contextmanager
def _marked(paths: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Paths that are there: inputs as they are; for outputs a file that is written into the folder for a moment."""
    found = {key: str(path) for key, path in paths.items() if key in INPUT_KEYS and path.exists()}
    marks = []
    for key in set(paths) & set(_OUTPUT_KEYS):
        mark = paths[key] / f".seen-by-every-node-{secrets.token_hex(4)}"
        try:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError:
            continue  # the job says what is wrong with its output
        marks.append(mark)
        found[key] = str(mark)
    try:
        yield found
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def _missing_on(nodes: dict[str, str], paths: dict[str, str]) -> dict[str, list[str]]:
    """Address -> keys whose path is not there, for the nodes that answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def missing() -> list[str]:
        from pathlib import Path

        return [key for key, path in paths.items() if not Path(path).exists()]

    probe = ray.remote(num_cpus=0, max_retries=0)(missing)
    asked: dict[ray.ObjectRef[list[str]], str] = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): address
        for address, node in nodes.items()
    }
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBE_TIMEOUT_S)
    result = {}
    for reference in answered:
        try:
            result[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError as error:
            logger.debug("the node at %s did not say whether it sees the paths: %s", asked[reference], error)
    if late:
        logger.warning("%d of %d nodes did not say within a minute whether they see the paths.", len(late), len(asked))
    return result
