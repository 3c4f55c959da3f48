"""The files of a shard set: the schema of a row, the manifest, and writing shards.

    manifest.json       what the set holds: schema, shards with rows, bytes and SHA-256, counts, settings
    part-00000.arrow    rows, in record batches of ``BATCH_ROWS``: row k is in batch k // BATCH_ROWS
    part-00001.arrow

The files are ordinary Arrow files: docs/data_format.md shows plain readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict, cast

import pyarrow as pa

from pipelines import storage
from tinygptv.data.sample import SampleRow
from tinygptv.json_object import JsonObject

FORMAT = "tinygptv-shards"
VERSION = 1
MANIFEST = "manifest.json"

BATCH_ROWS = 64
"""Rows of a record batch: small, because a batch is the least that a reader can address."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("image", pa.large_binary()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field(
            "turns",
            pa.list_(pa.struct([("question", pa.string()), ("answers", pa.list_(pa.string()))])),
            nullable=False,
        ),
        pa.field("boxes", pa.list_(pa.list_(pa.float64())), nullable=False),
    ],
    metadata={"format": FORMAT, "version": str(VERSION)},
)
"""Columns of every shard; their meaning: ``tinygptv.data.sample.SampleRow``."""

PREPARE_AGAIN = "run jobs/prepare_data.py again with overwrite=true."


class ShardError(ValueError):
    """A shard set is damaged, incomplete, or of another format. The text says which file and what to do."""


class Spread(TypedDict):
    """Least, mean and most of a column."""

    least: float
    mean: float
    most: float


class RowCounts(TypedDict, total=False):
    """Samples by outcome; ``rows_in`` is the sum of the four below it. A set that was not made by an ingest has none.

    Attributes:
        rows_in: input samples.
        rows_out: rows kept.
        duplicates: dropped, because an earlier row is the same.
        filtered: removed by filters.
        quarantined: set apart, because something is wrong with them.
        near_duplicates: rows that were kept, and hardly differ from an earlier one.
        filters: filter -> samples that it removed.
        changes: kind of change -> rows that were kept, but changed; see docs/data_format.md.
    """

    rows_in: int
    rows_out: int
    duplicates: int
    filtered: int
    quarantined: int
    near_duplicates: int
    filters: dict[str, int]
    changes: dict[str, int]


@dataclass(frozen=True)
class ShardInfo:
    """A shard's line in the manifest.

    Attributes:
        file: name in the set's folder.
        rows: number of rows.
        bytes: size of the file.
        sha256: of the file, in hexadecimal.
        statistics: of its rows; see docs/data_format.md.
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    statistics: dict[str, Spread] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: JsonObject) -> ShardInfo:
        """Read a line of a manifest, which may come from other people.

        Raises:
            KeyError, TypeError, ValueError: it is malformed, or its name leads out of the set's folder.
        """
        name = content["file"]
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
            raise ValueError(f"{name!r} is no file name")
        rows, num_bytes = (_whole_number(content[key], least=0) for key in ("rows", "bytes"))
        return cls(name, rows, num_bytes, str(content["sha256"]), dict(content.get("statistics") or {}))


def _whole_number(value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is no number of at least {least}")
    return value


@dataclass(frozen=True)
class Manifest:
    """Contents of a shard set.

    Attributes:
        source: data set name.
        shards: in row order.
        counts: rows in, out, and what became of the others.
        settings: of the job that decide what the files hold.
        batch_rows: rows of a record batch.
    """

    source: str
    shards: tuple[ShardInfo, ...]
    counts: RowCounts = field(default_factory=RowCounts)
    settings: dict[str, object] = field(default_factory=dict)
    batch_rows: int = BATCH_ROWS

    @property
    def digest(self) -> str:
        """Hash of the rows: the same for equal shards, wherever they are."""
        shards = [(shard.file, shard.sha256) for shard in self.shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:12]

    def to_json(self) -> bytes:
        """The file's content; equal manifests give equal bytes."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "schema": {name: str(SCHEMA.field(name).type) for name in SCHEMA.names},
        }
        body = asdict(self)
        body["rows"] = sum(shard.rows for shard in self.shards)
        return (json.dumps({**head, **body}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, uri: str) -> Manifest:
        """Read the manifest of a shard set.

        Raises:
            FileNotFoundError: there is none.
            ShardError: it is of another format.
        """
        location = storage.Location.parse(uri) / MANIFEST
        try:
            content = json.loads(storage.read_bytes(location))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{uri} is no shard set: it has no {MANIFEST}; make one with jobs/prepare_data.py."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{location} is no valid JSON ({error}): {PREPARE_AGAIN}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ShardError(f"{location} is not of format {FORMAT} version {VERSION}: {PREPARE_AGAIN}")
        try:
            shards = tuple(ShardInfo.from_json(shard) for shard in content["shards"])
            counts, settings = cast(RowCounts, dict(content["counts"])), dict(content["settings"])
            return cls(str(content["source"]), shards, counts, settings, _whole_number(content["batch_rows"], least=1))
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{location} is damaged ({type(error).__name__}: {error}): {PREPARE_AGAIN}") from error


def record_batch(rows: Sequence[SampleRow]) -> pa.RecordBatch:
    """Rows as one record batch of ``SCHEMA``."""
    return pa.RecordBatch.from_pylist([row.to_dict() for row in rows], schema=SCHEMA)


class ShardWriter:
    """Writes one shard: atomically, and with the hash of its bytes."""

    def __init__(self, location: str | storage.Location) -> None:
        """Start a shard.

        Args:
            location: of the file, which appears there when it is complete.
        """
        self.location = storage.Location.parse(location)
        self.rows = 0
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        with storage.disk_full_as_error(location):
            self._sink = _HashingSink(location)
            self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), SCHEMA)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append rows; they are cut into record batches of ``BATCH_ROWS`` whatever comes in."""
        self._waiting.append(batch)
        self._num_waiting += batch.num_rows
        self.rows += batch.num_rows
        if self._num_waiting >= BATCH_ROWS:
            self._flush(self._num_waiting - self._num_waiting % BATCH_ROWS)

    def close(self) -> ShardInfo:
        """Finish the file."""
        if self._num_waiting:
            self._flush(self._num_waiting)
        with storage.disk_full_as_error(self.location):
            self._writer.close()
            self._sink.finish()
        return ShardInfo(self.location.name, self.rows, self._sink.num_bytes, self._sink.hash.hexdigest())

    def abort(self) -> None:
        """Leave nothing behind."""
        self._sink.abort()

    def _flush(self, num_rows: int) -> None:
        table = pa.Table.from_batches(self._waiting, SCHEMA)
        with storage.disk_full_as_error(self.location):
            for start in range(0, num_rows, BATCH_ROWS):
                piece = table.slice(start, BATCH_ROWS).combine_chunks()
                self._writer.write_batch(piece.to_batches()[0])
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting -= num_rows


class _HashingSink:
    """A writable file, as Arrow asks for it, that hashes what passes and becomes visible only when it is finished."""

    def __init__(self, location: str | storage.Location) -> None:
        self.hash = hashlib.sha256()
        self.num_bytes = 0
        self._file = storage.AtomicFile(location)

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written; Arrow asks."""
        return self._file.closed

    def write(self, data: Any) -> int:
        """Append bytes."""
        self.hash.update(data)
        self._file.write(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand on; Arrow calls it."""
        self._file.flush()

    def close(self) -> None:
        """Arrow closes what it writes to; the file is finished later, by ``finish``."""

    def finish(self) -> None:
        """Make the file visible."""
        self._file.commit()

    def abort(self) -> None:
        """Leave nothing behind."""
        self._file.abort()
