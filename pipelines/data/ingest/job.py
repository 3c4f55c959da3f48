"""Ingest: source files -> checked, resized, deduplicated samples -> Arrow shards. The Ray Data graph.

    plan      input -> units: one per tar, or per slice of an annotation file          (driver, reads no image)
    stage     each unit -> staged rows, an index and a record                          (Ray Data, one or a few per task)
    publish   duplicates over all units -> shards -> lists, report, manifest           (driver, and one task per shard)

A unit is done from its first byte to its last by one task that writes its own files, so no image travels through the
object store, memory is one record batch per worker, and the speed is that of the decoder. The result is a function of
the input and the settings: number of workers, order of tasks and interruptions do not show in it.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from pipelines import storage
from pipelines.cluster import start_ray
from pipelines.data.ingest.inputs import INPUTS, QUARANTINE, STAGING, SetInputs, check_output
from pipelines.data.ingest.lists import NEAR_DUPLICATES, REMOVED, Staging
from pipelines.data.ingest.publish import NothingKeptError, ShardPlan, publish, write_shard
from pipelines.data.ingest.report import REPORT_HTML, REPORT_JSON
from pipelines.data.ingest.staging import content_settings, stage_unit
from pipelines.data.shard_format import MANIFEST, RowCounts, ShardError, ShardInfo
from pipelines.data.shards import ShardSet
from pipelines.data.sources import locate
from pipelines.data.sources.base import SourceUnit
from pipelines.progress import Bar
from pipelines.redact import redact
from pipelines.settings import PrepareDataSettings, SettingsError
from pipelines.tracking.base import open_tracker
from pipelines.units import Workers, map_units

logger = logging.getLogger(__name__)


class IngestCounts(RowCounts):
    """Samples by outcome, and units of work: all of them, and those that an earlier run had finished."""

    units: int
    reused_units: int


class SetLocations(TypedDict):
    """Locations of everything that an ingest writes."""

    output: str
    result: str
    manifest: str
    quarantine: str
    removed: str
    near_duplicate_list: str
    report_json: str
    report_html: str


class IngestResult(IngestCounts, SetLocations):
    """``result.json`` of an ingest."""

    seconds: float


class UnreadableError(ValueError):
    """A file that was there when the work was planned cannot be read now."""


def ingest(settings: PrepareDataSettings, *, parent_run_id: str = "", replaces_other: bool = False) -> IngestResult:
    """Prepare one source.

    Finished work of an interrupted run is verified and kept; a finished set is verified and returned as it is.

    Args:
        settings: source, input, output, filters. ``output`` is a folder (default ``data/<name>``) that all workers see.
        parent_run_id: tracker run to nest under.
        replaces_other: a set that was made from other input is replaced, as ``overwrite`` would; a finished one of the
            same input is kept.

    Returns:
        What stands in ``result.json``: counts, locations, ``seconds``.

    Raises:
        SettingsError: the source is unknown, its input is missing, or the output holds something else.
        NothingKeptError: no sample could be kept.
        DiskFullError: there is no room; the same command resumes.
        UnreadableError: an input file is no longer there, or a network storage fails; likewise.
    """
    started = time.perf_counter()
    source, source_input = locate(settings)
    units = list(source.reader.plan(source_input))
    if not units:
        raise SettingsError(f"input={settings.input!r} holds no entries: is it the right file?")
    inputs = SetInputs.of(source_input, units, settings)
    output = _output_folder(settings, source_input.name)
    storage.make_folder(output)
    with storage.alone(output):
        check_output(output, inputs, replaces_other=replaces_other or settings.overwrite)
        storage.remove_drafts(output)
        counts = None if settings.overwrite else _finished_before(output, inputs)
        if counts is None:
            counts = _prepare(settings, source_input.name, units, output, inputs)
            _track(settings, source_input.name, counts, output, parent_run_id)
        storage.remove_folder(storage.join(output, STAGING))
    result: IngestResult = {**counts, **_locations(output), "seconds": round(time.perf_counter() - started, 2)}
    storage.write_atomically(result["result"], json.dumps(result, indent=1).encode() + b"\n")
    return result


def _track(settings: PrepareDataSettings, name: str, counts: IngestCounts, output: str, parent_run_id: str) -> None:
    """Log settings, counts and the report."""
    tracker = open_tracker(settings, f"prepare {name}", parent_run_id=parent_run_id)
    tracker.params({"source": settings.source, "input": redact(settings.input), **content_settings(settings)})
    tracker.metrics({key: value for key, value in counts.items() if isinstance(value, int)}, step=0)
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        for report in (REPORT_HTML, REPORT_JSON, QUARANTINE):
            copy = Path(folder, report)
            storage.download(storage.join(output, report), copy)
            tracker.artifact(copy, "prepare_data")
        tracker.close()


def _output_folder(settings: PrepareDataSettings, name: str) -> str:
    if not storage.is_local(settings.output or "."):
        return settings.output_location(f"data/{name}")
    return str(settings.output_dir(f"data/{name}"))


def _locations(output: str) -> SetLocations:
    return {
        "output": output,
        "result": storage.join(output, "result.json"),
        "manifest": storage.join(output, MANIFEST),
        "quarantine": storage.join(output, QUARANTINE),
        "removed": storage.join(output, REMOVED),
        "near_duplicate_list": storage.join(output, NEAR_DUPLICATES),
        "report_json": storage.join(output, REPORT_JSON),
        "report_html": storage.join(output, REPORT_HTML),
    }


def _finished_before(output: str, inputs: SetInputs) -> IngestCounts | None:
    """Counts of a finished and sound set made from the same input with the same settings; None where there is none."""
    before = SetInputs.read(output)
    if before is None or before.difference(inputs):
        return None
    if before.has_new_images():
        logger.warning("%s: images that were missing are there now; the data is prepared again.", output)
        return None
    try:
        shards = ShardSet.open(output)
        shards.verify()
    except ShardError as error:
        logger.warning("%s", error)
        return None
    except FileNotFoundError:
        return None
    logger.info(
        "%s is finished already. Input files and settings are the same; images that they name were not looked at again "
        "(overwrite=true reads everything).",
        output,
    )
    return {**shards.manifest.counts, "reused_units": before.units, "units": before.units}


def _prepare(
    settings: PrepareDataSettings, name: str, units: Sequence[SourceUnit], output: str, inputs: SetInputs
) -> IngestCounts:
    """Do what is missing; the folder is complete when it has a manifest, and known when it has ``INPUTS``."""
    staging = storage.join(output, STAGING)
    if storage.exists(storage.join(output, INPUTS)):
        storage.remove_folder(staging)  # a finished set is replaced: nothing of it may be reused
    storage.make_folder(staging)  # first: it marks the folder as ours
    storage.remove_file(storage.join(output, INPUTS))
    storage.remove_file(storage.join(output, MANIFEST))  # from here on the folder is not complete
    staged = Staging(staging, len(units))
    with nullcontext() if settings.num_workers == 0 else start_ray(settings):
        reused = _run_units(settings, units, staging)
        try:
            counts = publish(settings, name, output, staged, partial(_write_shards, settings))
        except NothingKeptError:
            storage.remove_folder(staging)
            raise
    inputs.write(output, staged.missing())
    return {**counts, "units": len(units), "reused_units": reused}


def _run_units(settings: PrepareDataSettings, units: Sequence[SourceUnit], staging: str) -> int:
    """Read all units into the staging folder; returns how many were finished already."""
    rows_in = rows = reused = 0
    setup, workers = partial(_unit_reader, settings, staging), Workers(settings.num_workers)
    with Bar(f"prepare {settings.source}", quiet=settings.quiet) as bar:
        numbered = list(enumerate(units))
        done = map_units(
            setup, numbered, workers, settings, name="prepare_data", num_bytes=lambda unit: unit[1].num_bytes
        )
        for count, (_, outcome) in enumerate(done, start=1):
            rows_in, rows, reused = rows_in + outcome.rows_in, rows + outcome.rows, reused + outcome.was_finished
            speed = rows_in / bar.seconds
            bar.update(count, len(units), f"rows {rows_in:,} in, {rows:,} kept  {speed:,.0f} rows/s")
    return reused


@dataclass(frozen=True)
class UnitOutcome:
    """Counts of a unit, for the progress line.

    Attributes:
        rows_in: samples read.
        rows: rows kept.
        was_finished: an earlier run had finished it.
    """

    rows_in: int
    rows: int
    was_finished: bool


def _unit_reader(settings: PrepareDataSettings, staging: str) -> Callable[[tuple[int, SourceUnit]], UnitOutcome]:
    def read(numbered: tuple[int, SourceUnit]) -> UnitOutcome:
        number, unit = numbered
        with _unreadable_as_error():
            record, was_finished = stage_unit(unit, number, settings, staging)
        return UnitOutcome(record.rows_in, record.rows, was_finished)

    return read


def _write_shards(settings: PrepareDataSettings, plans: list[ShardPlan]) -> list[ShardInfo]:
    """Write shards, on the cluster where rows must be copied for several of them."""
    copies = [number for number, plan in enumerate(plans) if len(plan.pieces) > 1 or plan.pieces[0].rows is not None]
    if len(copies) <= 1:
        return [write_shard(plan) for plan in plans]
    numbered, workers = [(n, plans[n]) for n in copies], Workers(settings.num_workers)
    work = map_units(_shard_writer, numbered, workers, settings, name="prepare_data: shards")
    written = {number: info for (number, _), info in work}
    return [written[number] if number in written else write_shard(plan) for number, plan in enumerate(plans)]


def _shard_writer() -> Callable[[tuple[int, ShardPlan]], ShardInfo]:
    def write(numbered: tuple[int, ShardPlan]) -> ShardInfo:
        with _unreadable_as_error():
            return write_shard(numbered[1])

    return write


@contextmanager
def _unreadable_as_error() -> Iterator[None]:
    """An input file that vanished, or a network storage that fails, as one sentence."""
    try:
        yield
    except OSError as error:
        raise UnreadableError(f"{error}; finished parts are kept: run the same command again to resume.") from error
