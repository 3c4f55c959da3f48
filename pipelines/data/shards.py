"""Shard sets: folders of Arrow IPC files with canonical samples, and random access to their rows.

A local shard is memory-mapped, so that a row costs the reading of its own bytes alone. A remote one is downloaded once,
into a cache of bounded size.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import cast

import pyarrow as pa

from pipelines import storage
from pipelines.data.shard_cache import ShardCache
from pipelines.data.shard_format import MANIFEST, PREPARE_AGAIN, SCHEMA, Manifest, ShardError
from tinygptv.data.sample import ArrowRow, SampleRow
from tinygptv.lru import LRU

_OPEN_SHARDS = 128
_OPEN_BATCHES = 256
"""Record batches whose columns are kept: finding one in its file costs twice as much as reading a row of it. They refer
to the mapped files, so each takes some kilobytes."""


def find_shard_sets(data: str) -> list[str]:
    """Locations of the shard sets in a folder or URI: itself, where it is one, else those directly in it, by name."""
    if storage.exists(storage.join(data, MANIFEST)):
        return [data]
    folders = (storage.join(data, name) for name in storage.list_folders(data))
    return [folder for folder in folders if storage.exists(storage.join(folder, MANIFEST))]


def sizes_of(folder: str, names: Sequence[str]) -> dict[str, int]:
    """Sizes in bytes of those files of a folder that are there: one listing, and a question for each that it lacks,
    since the listings of some storages lag behind."""
    location, sizes = storage.Location.parse(folder), storage.list_names(folder)
    for name in names:
        if name not in sizes and not location.is_local and (size := storage.num_bytes(location / name)) >= 0:
            sizes[name] = size
    return sizes


class ShardSet:
    """An opened shard set: random access to its rows. Cheap to pickle; files are opened on first use."""

    def __init__(self, uri: str, manifest: Manifest, cache: ShardCache | None = None) -> None:
        self.uri = uri
        self.manifest = manifest
        self._folder = storage.Location.parse(uri)
        self._cache = cache or ShardCache()
        self._starts = list(accumulate((shard.rows for shard in manifest.shards), initial=0))
        self._readers: LRU[int, pa.ipc.RecordBatchFileReader] = LRU(_OPEN_SHARDS)
        self._columns: LRU[tuple[int, int], dict[str, pa.Array]] = LRU(_OPEN_BATCHES)

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
        uri = uri.rstrip("/") or uri
        opened = cls(uri, Manifest.read(uri), cache)
        sizes = sizes_of(uri, [shard.file for shard in opened.manifest.shards])
        for shard in opened.manifest.shards:
            if shard.file not in sizes:
                raise ShardError(f"{uri} is incomplete: {shard.file} is missing; {PREPARE_AGAIN}")
            if sizes[shard.file] != shard.bytes:
                raise ShardError(
                    f"{uri}/{shard.file} has {sizes[shard.file]} bytes instead of {shard.bytes}: it is cut off or was "
                    f"changed; {PREPARE_AGAIN}"
                )
        return opened

    def __len__(self) -> int:
        return self._starts[-1]

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
        columns, position = self._locate(index)
        row = {name: column[position].as_py() for name, column in columns.items()}
        return SampleRow.from_dict(cast(ArrowRow, row))

    def rows(self, indices: Iterable[int]) -> list[SampleRow]:
        """Several rows, in the order asked for."""
        return [self.row(index) for index in indices]

    def row_id(self, index: int) -> str:
        """Id of a row, without touching its image."""
        columns, position = self._locate(index)
        return str(columns["id"][position].as_py())

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
            shard.file for shard in self.manifest.shards if storage.sha256(self._folder / shard.file) != shard.sha256
        ]
        if wrong:
            names = ", ".join(wrong)
            raise ShardError(f"{self.uri}: the content of {names} does not match the manifest; {PREPARE_AGAIN}")

    def __reduce__(self) -> tuple[type[ShardSet], tuple[str, Manifest, ShardCache]]:
        return ShardSet, (self.uri, self.manifest, self._cache)

    def _locate(self, index: int) -> tuple[dict[str, pa.Array], int]:
        """The columns of a row's record batch, and its position there."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} does not exist: {self.uri} has {len(self)} rows.")
        shard = bisect_right(self._starts, index) - 1
        number, position = divmod(index - self._starts[shard], self.manifest.batch_rows)
        return self._columns.get_or_make((shard, number), lambda: self._columns_of(shard, number)), position

    def _columns_of(self, shard: int, number: int) -> dict[str, pa.Array]:
        return dict(zip(SCHEMA.names, self._batch(shard, number).columns, strict=True))

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
        location = self._folder / info.file
        try:
            path = location.path if location.is_local else self._cache.fetch(location, info.sha256)
            if (size := Path(path).stat().st_size) != info.bytes:
                raise self._unreadable(shard, f"it has {size} bytes, not {info.bytes}: it was written again or cut off")
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise self._unreadable(shard, error) from error
        self._check(shard, reader)
        return reader

    def _check(self, shard: int, reader: pa.ipc.RecordBatchFileReader) -> None:
        """Refuse a file that has other columns, or another number of record batches, than the manifest promises."""
        info = self.manifest.shards[shard]
        num_batches = -(-info.rows // self.manifest.batch_rows)
        if reader.num_record_batches != num_batches:
            raise self._unreadable(shard, f"it has {reader.num_record_batches} record batches, not {num_batches}")
        if not reader.schema.equals(SCHEMA):
            raise self._unreadable(shard, f"its columns are {', '.join(reader.schema.names)}, or of other types")

    def _unreadable(self, shard: int, error: Exception | str) -> ShardError:
        return ShardError(f"{self.uri}/{self.manifest.shards[shard].file} cannot be read ({error}); {PREPARE_AGAIN}")
