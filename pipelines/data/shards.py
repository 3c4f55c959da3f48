"""Shard sets: folders of Arrow IPC files with canonical samples, and random access to their rows.

    manifest.json       what the set holds: schema, shards with rows, bytes and SHA-256, counts, settings
    part-00000.arrow    rows, in record batches of ``BATCH_ROWS``: row k lies in batch k // BATCH_ROWS
    part-00001.arrow

A local shard is memory-mapped, so that a row costs the reading of its own bytes alone. A remote one is downloaded once,
into a cache of bounded size. The files are ordinary Arrow files: docs/data_format.md shows plain readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.data.shard_cache import ShardCache
from tinygptv.data.sample import SampleRow
from tinygptv.lru import LRU

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
"""Columns of every shard; their meaning stands at ``tinygptv.data.sample.SampleRow``."""

_OPEN_SHARDS = 128


class ShardError(ValueError):
    """A shard set is damaged, incomplete, or of another format. The text says which file and what to do."""


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
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a shard set holds.

    Attributes:
        source: data set name.
        shards: in row order.
        counts: rows in, out, and what became of the others.
        settings: of the job that decide what the files hold.
        batch_rows: rows of a record batch.
    """

    source: str
    shards: tuple[ShardInfo, ...]
    counts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    batch_rows: int = BATCH_ROWS

    @property
    def digest(self) -> str:
        """Hash of the rows: the same for equal shards, wherever they lie."""
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
        place = storage.join(uri, MANIFEST)
        try:
            content = json.loads(storage.read_bytes(place))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{uri} is no shard set: it has no {MANIFEST}; make one with jobs/prepare_data.py."
            ) from error
        except ValueError as error:
            raise ShardError(f"{place} is no valid JSON ({error}): prepare the data anew.") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
            raise ShardError(f"{place} is not of format {FORMAT} version {VERSION}: prepare the data anew.")
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        return cls(content["source"], shards, content["counts"], content["settings"], content["batch_rows"])


def find_shard_sets(data: str) -> list[str]:
    """Locations of the shard sets in a folder or URI: itself, where it is one, else those directly in it, by name."""
    if storage.exists(storage.join(data, MANIFEST)):
        return [data]
    folders = (storage.join(data, name) for name in storage.list_folders(data))
    return [folder for folder in folders if storage.exists(storage.join(folder, MANIFEST))]


def record_batch(rows: Sequence[SampleRow]) -> pa.RecordBatch:
    """Rows as one record batch of ``SCHEMA``."""
    columns = {
        "id": [row.id for row in rows],
        "source": [row.source for row in rows],
        "task": [row.task for row in rows],
        "image": [row.image for row in rows],
        "width": [row.width for row in rows],
        "height": [row.height for row in rows],
        "turns": [[{"question": turn.question, "answers": turn.answers} for turn in row.turns] for row in rows],
        "boxes": [row.boxes for row in rows],
    }
    return pa.record_batch([pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


class ShardWriter:
    """Writes one shard: atomically, and with the hash of its bytes."""

    def __init__(self, place: str) -> None:
        """Start a shard.

        Args:
            place: local path or URI. A local file appears there when it is complete.
        """
        self.place = place
        self.rows = 0
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        with storage.disk_full_as_error(place):
            self._sink = _HashingSink(place)
            self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), SCHEMA)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._sink.num_bytes

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
        with storage.disk_full_as_error(self.place):
            self._writer.close()
            self._sink.finish()
        name = storage.file_name(self.place)
        return ShardInfo(name, self.rows, self._sink.num_bytes, self._sink.hash.hexdigest())

    def abort(self) -> None:
        """Leave nothing behind."""
        self._sink.abort()

    def _flush(self, num_rows: int) -> None:
        table = pa.Table.from_batches(self._waiting, SCHEMA)
        with storage.disk_full_as_error(self.place):
            for start in range(0, num_rows, BATCH_ROWS):
                piece = table.slice(start, min(BATCH_ROWS, num_rows - start)).combine_chunks()
                self._writer.write_batch(piece.to_batches()[0])
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting -= num_rows


class _HashingSink:
    """A writable file that hashes what passes, and becomes visible only when it is finished."""

    def __init__(self, place: str) -> None:
        filesystem, path = storage.resolve(place)
        self.hash = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False
        self._target = Path(path) if storage.is_local(place) else None
        self._draft = storage.draft_of(self._target) if self._target else None
        self._file: IO[bytes] | pa.NativeFile = (
            self._draft.open("wb") if self._draft else filesystem.open_output_stream(path)
        )

    def write(self, data: Any) -> int:
        """Append bytes."""
        self.hash.update(data)
        self._file.write(data)
        self.num_bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """Pass on; Arrow calls it."""
        self._file.flush()

    def close(self) -> None:
        """Arrow closes what it writes to; the file is finished later, by ``finish``."""

    def finish(self) -> None:
        """Make the file visible."""
        self._file.close()
        self.closed = True
        if self._draft and self._target:
            self._draft.replace(self._target)

    def abort(self) -> None:
        """Remove what was written, where the storage shows it at all."""
        if self._draft:
            self._file.close()
            self._draft.unlink(missing_ok=True)


class ShardSet:
    """An opened shard set: random access to its rows. Cheap to pickle; files are opened on first use."""

    def __init__(self, uri: str, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.uri = uri
        self.manifest = manifest
        self._cache = cache or ShardCache()
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards)], dtype=np.int64)
        self._readers: LRU[int, pa.ipc.RecordBatchFileReader] = LRU(_OPEN_SHARDS)

    @classmethod
    def open(cls, uri: str, cache: ShardCache | None = None) -> ShardSet:
        """Open a shard set.

        Args:
            uri: folder of ``jobs/prepare_data.py``, local or remote.
            cache: where shards of a remote set are kept; the default one where it is None.

        Raises:
            FileNotFoundError: there is no manifest.
            ShardError: a shard of the manifest is missing or has another size.
        """
        uri = uri.rstrip("/")
        opened = cls(uri, Manifest.read(uri), cache)
        sizes = storage.list_names(uri)
        for shard in opened.manifest.shards:
            if shard.file not in sizes:
                raise ShardError(f"{uri} is incomplete: {shard.file} is missing; {_MEND}")
            if sizes[shard.file] != shard.bytes:
                raise ShardError(
                    f"{uri}/{shard.file} has {sizes[shard.file]} bytes instead of {shard.bytes}: it is cut off or was "
                    f"changed; {_MEND}"
                )
        return opened

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each shard, in row order; what ``tinygptv.data.mixture.MixtureSource`` asks for."""
        return tuple(shard.rows for shard in self.manifest.shards)

    def row(self, index: int) -> SampleRow:
        """Row ``index``, 0-based, counted through the shards.

        Raises:
            IndexError: there is no such row.
            ShardError: the shard cannot be read.
        """
        batch, place = self._locate(index)
        return SampleRow.from_dict({name: batch.column(name)[place].as_py() for name in SCHEMA.names})

    def rows(self, indices: Iterable[int]) -> list[SampleRow]:
        """Several rows, in the order asked for."""
        return [self.row(index) for index in indices]

    def row_id(self, index: int) -> str:
        """Id of a row, without touching its image."""
        batch, place = self._locate(index)
        return batch.column("id")[place].as_py()

    def __iter__(self) -> Iterator[SampleRow]:
        for shard in range(len(self.manifest.shards)):
            for batch in self.batches(shard):
                yield from (SampleRow.from_dict(row) for row in batch.to_pylist())

    def batches(self, shard: int) -> Iterator[pa.RecordBatch]:
        """Record batches of one shard, in order."""
        reader = self._reader(shard)
        for number in range(reader.num_record_batches):
            yield self._batch(shard, number)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows as a table over the memory-mapped files; nothing is read until it is looked at."""
        tables = [pa.Table.from_batches(self.batches(shard), SCHEMA) for shard in range(len(self.manifest.shards))]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        return table.select(list(columns)) if columns is not None else table

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            ShardError: some differ; names all of them.
        """
        wrong = [
            shard.file
            for shard in self.manifest.shards
            if storage.sha256(storage.join(self.uri, shard.file)) != shard.sha256
        ]
        if wrong:
            raise ShardError(f"{self.uri}: the content of {', '.join(wrong)} does not match the manifest; {_MEND}")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "manifest": self.manifest, "cache": self._cache}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["uri"], state["manifest"], state["cache"])

    def _locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} does not exist: {self.uri} has {len(self)} rows.")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, place = divmod(index - int(self._starts[shard]), self.manifest.batch_rows)
        return self._batch(shard, number), place

    def _batch(self, shard: int, number: int) -> pa.RecordBatch:
        try:
            batch = self._reader(shard).get_batch(number)
            batch.validate()  # offsets that point out of the file would crash the process later
            return batch
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(shard, error) from error

    def _reader(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        return self._readers.get_or_make(shard, lambda: self._open_file(shard))

    def _open_file(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        info = self.manifest.shards[shard]
        place = storage.join(self.uri, info.file)
        try:
            path = storage.resolve(place)[1] if storage.is_local(place) else self._cache.fetch(place, info.sha256)
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(shard, error) from error

    def _unreadable(self, shard: int, error: Exception) -> ShardError:
        return ShardError(f"{self.uri}/{self.manifest.shards[shard].file} cannot be read ({error}); {_MEND}")


_MEND = "remove the folder's manifest.json and run jobs/prepare_data.py again."
