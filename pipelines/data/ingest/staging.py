"""One unit of ingest: read, check, write. Pure work on files, without Ray; the same unit always gives the same bytes.

A finished unit leaves three things in the staging folder, the record last, so that a record means that all are there:

    unit-000003-000.arrow     rows (several files where one would exceed the bounds)
    unit-000003.index.arrow   per row: content hash, image hash, perceptual hash, sizes, words
    unit-000003.json          the record: counts, hashes of the files, what was set apart and why
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

import cv2
import pyarrow as pa

from pipelines import storage
from pipelines.data.ingest.checked_rows import IndexEntry, checked_rows
from pipelines.data.shard_format import BATCH_ROWS, ShardInfo, ShardWriter, record_batch
from pipelines.data.sources.base import Changes, Rejected, SourceUnit
from pipelines.settings import PrepareDataSettings
from tinygptv.data.sample import SampleRow
from tinygptv.json_object import JsonObject

STAGING_VERSION = 4
"""Part of every fingerprint: raise it when what a unit writes changes."""

CONTENT_SETTINGS = (
    "image_size",
    "jpeg_quality",
    "shard_rows",
    "shard_mb",
    "min_side",
    "max_aspect_ratio",
    "max_megapixels",
    "min_words",
    "min_letters",
    "max_repetition",
    "duplicates",
    "near_duplicate_bits",
)
"""Settings that decide what the shards hold; others (paths, CPUs) must not."""

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("content_hash", pa.binary(16)),
        ("image_hash", pa.uint64()),
        ("perceptual_hash", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image_bytes", pa.int64()),
        ("words", pa.int32()),
        ("kept", pa.bool_()),
    ]
)

_MOST_MISSING = 100
"""Missing images of a unit that its record names: enough to notice that they were added."""

_ROW_BYTES = 256
"""Approximate bytes of a row besides its image; only for the bound on a shard's size."""


@dataclass
class UnitRecord:
    """Outcome of a unit.

    Attributes:
        fingerprint: of its input and the settings; another one means that the unit must be read again.
        shard: input file.
        id_prefix: what the ids of its rows have before the key.
        rows_in: input samples.
        files: shard files in the staging folder, in row order.
        index_sha256: of the index file.
        rejected: samples that gave no row.
        changes: samples that were kept, but changed, by the kind of change.
        missing: locations of missing images, as pairs of ``Location``'s fields; the first ones alone.
    """

    fingerprint: str
    shard: str
    id_prefix: str
    rows_in: int = 0
    files: list[ShardInfo] = field(default_factory=list)
    index_sha256: str = ""
    rejected: list[Rejected] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, found: Rejected) -> None:
        """Add a sample that gave no row."""
        if len(self.missing) < _MOST_MISSING:
            self.missing += found.missing
        self.rejected.append(replace(found, missing=()))

    @property
    def rows(self) -> int:
        """Rows written."""
        return sum(file.rows for file in self.files)

    @classmethod
    def from_json(cls, content: JsonObject) -> UnitRecord:
        """Read what ``dataclasses.asdict`` gave."""
        files = [ShardInfo(**file) for file in content.pop("files")]
        rejected = [Rejected(**{**entry, "missing": ()}) for entry in content.pop("rejected")]
        missing = [(str(root), str(path)) for root, path in content.pop("missing")]
        return cls(files=files, rejected=rejected, missing=missing, **content)


def unit_name(number: int) -> str:
    """Stem of a unit's files."""
    return f"unit-{number:06d}"


def fingerprint(unit: SourceUnit, settings: PrepareDataSettings) -> str:
    """Hash of everything that decides what a unit gives, but for the images that it names."""
    fields = asdict(replace(unit, details=None))
    if fields["source"]["split"] == "train":  # as before there was the key: finished sets stay known
        del fields["source"]["split"]
    known = {
        "version": STAGING_VERSION,
        "unit": fields,
        "details": repr(unit.details),
        "settings": content_settings(settings),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def content_settings(settings: PrepareDataSettings) -> dict[str, object]:
    """The settings that decide what the shards hold."""
    return {name: getattr(settings, name) for name in CONTENT_SETTINGS}


def stage_unit(unit: SourceUnit, number: int, settings: PrepareDataSettings, staging: str) -> tuple[UnitRecord, bool]:
    """Read one unit into the staging folder, or find that this was done.

    Args:
        unit: what to read.
        number: its number among all units.
        settings: checks, filters, sizes.
        staging: folder for its files.

    Returns:
        The record, and whether it was there already.

    Raises:
        DiskFullError: there is no room.
        OSError: an input file cannot be read.
    """
    mark = fingerprint(unit, settings)
    done = read_record(staging, number)
    if done is not None and done.fingerprint == mark and _is_current(done, staging, number):
        return done, True
    cv2.setNumThreads(1)  # a task owns one CPU
    record = UnitRecord(mark, unit.shard, unit.row_id(""))
    changes: Changes = Changes()
    output = _StagedFiles(staging, unit_name(number), settings)
    try:
        for found in checked_rows(unit, settings, changes):
            record.rows_in += 1
            if isinstance(found, Rejected):
                record.reject(found)
            else:
                output.add(*found)
        record.files = output.close()
    except BaseException:
        output.abort()
        raise
    record.changes = dict(sorted(changes.items()))
    record.index_sha256 = _write_index(storage.join(staging, f"{unit_name(number)}.index.arrow"), output.index)
    content = json.dumps(asdict(record), ensure_ascii=True)
    storage.write_atomically(storage.join(staging, f"{unit_name(number)}.json"), content.encode())
    return record, False


def read_record(staging: str, number: int) -> UnitRecord | None:
    """The record of a finished unit; None where it is missing or unreadable."""
    try:
        return UnitRecord.from_json(json.loads(storage.read_bytes(storage.join(staging, f"{unit_name(number)}.json"))))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def read_index(staging: str, number: int, columns: list[str] | None = None) -> pa.Table:
    """Index of a finished unit: one line per row."""
    with storage.open_file(storage.join(staging, f"{unit_name(number)}.index.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    return table.select(columns) if columns else table


def _is_current(record: UnitRecord, staging: str, number: int) -> bool:
    """Whether a unit's files are sound, and the images that were missing still are."""
    expected = {file.file: file.sha256 for file in record.files}
    expected[f"{unit_name(number)}.index.arrow"] = record.index_sha256
    if not all(storage.sha256(storage.join(staging, name)) == digest for name, digest in expected.items()):
        return False
    return not any_exists(record.missing)


def any_exists(locations: Iterable[tuple[str, str]]) -> bool:
    """Whether any of several files is there; they are given as pairs of ``Location``'s fields."""
    return any(storage.exists(storage.Location(root, path)) for root, path in locations)


class _StagedFiles:
    """Shard files of one unit, each within the bounds, and the index of their rows."""

    def __init__(self, folder: str, name: str, settings: PrepareDataSettings) -> None:
        self.folder, self.name = folder, name
        self.max_rows = settings.shard_rows
        self.max_bytes = settings.shard_mb << 20
        self.index: list[IndexEntry] = []
        self._rows: list[SampleRow] = []
        self._num_bytes = 0  # of the file that is being written, waiting rows included
        self._writer: ShardWriter | None = None
        self._done: list[ShardInfo] = []

    def add(self, row: SampleRow, entry: IndexEntry) -> None:
        num_bytes = len(row.image or b"") + _ROW_BYTES
        if self._num_bytes and self._num_bytes + num_bytes > self.max_bytes:
            self._finish_file()
        self.index.append(entry)
        self._rows.append(row)
        self._num_bytes += num_bytes
        if len(self._rows) == BATCH_ROWS:
            self._flush()
        if len(self._rows) + (self._writer.rows if self._writer else 0) == self.max_rows:
            self._finish_file()

    def close(self) -> list[ShardInfo]:
        self._finish_file()
        return self._done

    def abort(self) -> None:
        if self._writer:
            self._writer.abort()

    def _flush(self) -> None:
        if self._rows:
            if self._writer is None:
                file = f"{self.name}-{len(self._done):03d}.arrow"
                self._writer = ShardWriter(storage.join(self.folder, file))
            self._writer.write(record_batch(self._rows))
            self._rows = []

    def _finish_file(self) -> None:
        self._flush()
        if self._writer:
            self._done.append(self._writer.close())
        self._writer, self._num_bytes = None, 0


def _write_index(location: str, entries: list[IndexEntry]) -> str:
    """Write the index of a unit; returns its SHA-256."""
    sink = pa.BufferOutputStream()
    values = zip(*entries, strict=True) if entries else [()] * len(INDEX_SCHEMA)
    columns = [pa.array(column, f.type) for column, f in zip(values, INDEX_SCHEMA, strict=True)]
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA))
    data = sink.getvalue().to_pybytes()
    storage.write_atomically(location, data)
    return hashlib.sha256(data).hexdigest()
