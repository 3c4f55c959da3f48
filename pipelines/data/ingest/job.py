"""Ingest: source files -> checked, resized, deduplicated samples -> Arrow shards. The Ray Data graph.

    plan      input -> units: one per tar, or per slice of an annotation file          (driver, reads no image)
    units     each unit -> staged rows, an index and a record                          (one Ray task per unit)
    finish    duplicates over all units -> shards -> lists, report, manifest           (driver, and one task per shard)

A unit is done from its first byte to its last by one task that writes its own files, so no image travels through the
object store, memory is one record batch per worker, and the speed is that of the decoder. The result is a function of
the input and the settings: number of workers, order of tasks and interruptions do not show in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.cluster import quiet_ray_data, start_ray
from pipelines.data.ingest.publish import NEAR_DUPLICATES, QUARANTINE, REMOVED, ShardPlan, Staging, finish, write_shard
from pipelines.data.ingest.report import REPORT_HTML, REPORT_JSON
from pipelines.data.ingest.unit import content_settings, fingerprint, process_unit
from pipelines.data.shards import MANIFEST, ShardError, ShardInfo, ShardSet
from pipelines.data.sources import locate
from pipelines.data.sources.base import Unit
from pipelines.progress import format_seconds
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.tracking.base import open_tracker

logger = logging.getLogger(__name__)

STAGING = "_staging"
INPUTS = "inputs.json"
"""Says which input and settings a finished folder was made from."""

Work = Callable[[dict[str, Any]], dict[str, Any]]


class UnreadableError(ValueError):
    """A file that was there when the work was planned cannot be read now."""


def ingest(settings: PrepareDataSettings, *, parent_run_id: str = "") -> dict[str, Any]:
    """Prepare one source.

    Finished work of an interrupted run is verified and kept; a finished set is verified and returned as it is.

    Args:
        settings: source, input, output, filters. ``output`` is a folder (default ``data/<name>``) that all workers see.
        parent_run_id: tracker run to nest under.

    Returns:
        ``rows_in, rows_out, duplicates, filtered, quarantined`` (rows_in is the sum of the others), counts per filter,
        places of everything that was written, ``seconds``, and ``result``: where this is written as JSON.

    Raises:
        SettingsError: the source is unknown or its input is missing.
        DiskFullError: there is no room; the same command goes on from there.
        UnreadableError: an input file is no longer there, or a network storage fails; likewise.
    """
    started = time.perf_counter()
    source, location = locate(settings)
    units = list(source.reader.plan(location))
    mark = hashlib.sha256("".join(fingerprint(unit, settings) for unit in units).encode()).hexdigest()
    output = _output_place(settings, location.name)
    storage.make_folder(output)
    with _alone(output):
        storage.remove_drafts(output)
        counts = None if settings.overwrite else _finished_before(output, mark)
        if counts is None:
            counts = _prepare(settings, location.name, units, output, mark)
            _track(settings, location.name, counts, output, parent_run_id)
        storage.remove_folder(storage.join(output, STAGING))
    result = {**counts, **_places(output), "seconds": round(time.perf_counter() - started, 2)}
    storage.write_atomically(result["result"], json.dumps(result, indent=1).encode() + b"\n")
    return result


def _track(settings: PrepareDataSettings, name: str, counts: dict[str, Any], output: str, parent_run_id: str) -> None:
    """Log settings, counts and the report."""
    tracker = open_tracker(settings, f"prepare {name}", parent_run_id=parent_run_id)
    tracker.params({"source": settings.source, "input": settings.input, **content_settings(settings)})
    tracker.metrics({key: value for key, value in counts.items() if isinstance(value, int)}, step=0)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        for report in (REPORT_HTML, REPORT_JSON, QUARANTINE):
            copy = Path(folder, report)
            storage.download(storage.join(output, report), copy)
            tracker.artifact(copy, "prepare_data")
        tracker.close()


def _output_place(settings: PrepareDataSettings, name: str) -> str:
    if "://" in settings.output:
        return settings.output.rstrip("/")
    return str(settings.output_dir(f"data/{name}"))


def _places(output: str) -> dict[str, str]:
    names = {
        "result": "result.json",
        "manifest": MANIFEST,
        "quarantine": QUARANTINE,
        "removed": REMOVED,
        "near_duplicate_list": NEAR_DUPLICATES,
        "report_json": REPORT_JSON,
        "report_html": REPORT_HTML,
    }
    return {"output": output, **{key: storage.join(output, name) for key, name in names.items()}}


def _finished_before(output: str, mark: str) -> dict[str, Any] | None:
    """Counts of a finished and sound set made from the same input with the same settings; None where there is none."""
    try:
        inputs = json.loads(storage.read_bytes(storage.join(output, INPUTS)))
        shards = ShardSet.open(output)
        if inputs.get("fingerprint") != mark:
            logger.warning("%s was made from other input or settings; it is made anew.", output)
            return None
        shards.verify()
    except ShardError as error:
        logger.warning("%s", error)
        return None
    except (FileNotFoundError, ValueError):
        return None
    return {**shards.manifest.counts, "reused_units": inputs["units"], "units": inputs["units"]}


def _prepare(settings: PrepareDataSettings, name: str, units: Sequence[Unit], output: str, mark: str) -> dict[str, Any]:
    """Do what is missing; the folder is complete when it has a manifest, and known when it has ``INPUTS``."""
    staging = storage.join(output, STAGING)
    storage.remove_file(storage.join(output, INPUTS))
    storage.remove_file(storage.join(output, MANIFEST))  # from here on the folder is not complete
    storage.make_folder(staging)
    with start_ray(settings):
        reused = _run_units(settings, units, staging)
        counts = finish(settings, name, output, Staging(staging, len(units)), _write_shards)
    storage.write_atomically(
        storage.join(output, INPUTS), json.dumps({"fingerprint": mark, "units": len(units)}).encode() + b"\n"
    )
    return {**counts, "units": len(units), "reused_units": reused}


def _run_units(settings: PrepareDataSettings, units: Sequence[Unit], staging: str) -> int:
    """Do all units; returns how many were done already."""

    def work(item: dict[str, Any]) -> dict[str, Any]:
        record, reused = process_unit(pickle.loads(item["work"]), item["number"], settings, staging)
        return {"rows_in": record.rows_in, "rows": record.rows, "reused": reused}

    items = [{"work": pickle.dumps(unit), "number": number} for number, unit in enumerate(units)]
    progress = UnitProgress(f"prepare {settings.source}", len(units), quiet=settings.quiet)
    reused = 0
    try:
        for done in _map_on_cluster(work, items):
            reused += done["reused"]
            progress.update(done["rows_in"], done["rows"])
    finally:
        progress.close()
    return reused


def _write_shards(plans: list[ShardPlan]) -> list[ShardInfo]:
    """Write shards, on the cluster where rows must be copied for several of them."""
    copies = [number for number, plan in enumerate(plans) if len(plan.pieces) > 1 or plan.pieces[0].rows is not None]
    if len(copies) <= 1:
        return [write_shard(plan) for plan in plans]

    def work(item: dict[str, Any]) -> dict[str, Any]:
        return {"number": item["number"], "info": pickle.dumps(write_shard(pickle.loads(item["work"])))}

    items = [{"work": pickle.dumps(plans[number]), "number": number} for number in copies]
    written = {done["number"]: pickle.loads(done["info"]) for done in _map_on_cluster(work, items)}
    return [written[number] if number in written else write_shard(plan) for number, plan in enumerate(plans)]


def _map_on_cluster(work: Work, items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results of ``work`` on each item, one Ray task per item, in the order in which they finish.

    Raises:
        DiskFullError, UnreadableError: a task met one; it travels as a value, so that it arrives without Ray's trace.
    """
    import ray.data

    quiet_ray_data()
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(_carry_errors(work), num_cpus=1)
    for done in dataset.iter_rows():
        if done["error"]:
            raise pickle.loads(done["error"])
        yield pickle.loads(done["result"])


def _carry_errors(work: Work) -> Work:
    def carrying(item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"error": b"", "result": pickle.dumps(work(item))}
        except storage.DiskFullError as error:
            return {"error": pickle.dumps(error), "result": b""}
        except OSError as error:
            told = UnreadableError(f"{error}; finished parts are kept, and the same command goes on from there.")
            return {"error": pickle.dumps(told), "result": b""}

    return carrying


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """Keep two runs from writing into one local folder."""
    if not storage.is_local(output):
        yield
        return
    with Path(storage.resolve(output)[1], ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"another run is writing into output={output!r}: wait for it, or choose another."
            ) from error
        yield


class UnitProgress:
    """One line: units done, rows in and out, rows per second, time left; live in a terminal, else now and then."""

    def __init__(self, title: str, total: int, *, quiet: bool, log_every_s: float = 10.0) -> None:
        self.title, self.total, self.quiet, self.log_every_s = title, total, quiet, log_every_s
        self.live = sys.stderr.isatty()
        self.began = self.printed = time.perf_counter()
        self.done = self.rows_in = self.rows = 0

    def update(self, rows_in: int, rows: int) -> None:
        """One more unit is finished."""
        self.done += 1
        self.rows_in += rows_in
        self.rows += rows
        now = time.perf_counter()
        if self.quiet or not (self.live or now - self.printed >= self.log_every_s or self.done == self.total):
            return
        self.printed = now
        seconds = max(now - self.began, 1e-6)
        left = seconds / self.done * (self.total - self.done)
        line = (
            f"{self.title}: unit {self.done}/{self.total}  rows {self.rows_in:,} in, {self.rows:,} kept  "
            f"{self.rows_in / seconds:,.0f} rows/s  left {format_seconds(left)}"
        )
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self.live and not self.quiet and self.done:
            print(file=sys.stderr)
