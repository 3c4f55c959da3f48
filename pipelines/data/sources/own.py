"""One's own data: files of JSON rows, a Hugging Face data set, or a folder of Parquet or Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    Changes,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
)
from pipelines.data.sources.delimited import is_delimited
from pipelines.data.sources.drafts import read_drafts
from pipelines.data.sources.images import BESIDE, ImageFolder, find_image_folder
from pipelines.data.sources.json_entries import detect_form, plan_entries, read_entries
from pipelines.data.sources.own_rows import KNOWN_BY, read_own_row
from pipelines.data.sources.table_files import find_tables
from pipelines.settings import SettingsError

_BATCH_ROWS = 64
_READ_AT_ONCE = 64 << 20


@dataclass(frozen=True)
class JsonRowsReader:
    """Files of rows: JSON lines, a list, or an object that holds one. Images are named relative to the file."""

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` rows; blank lines are no rows."""
        for file in find_input(source, "*.{jsonl,ndjson,jsonl.gz,jsonl.zst}", "*.json"):
            if is_delimited(file.location):
                raise SettingsError(
                    f"{file.location} is a table with separators (CSV or TSV), not JSON: use source=csv."
                )
            folder = find_image_folder(source, file.location, BESIDE)
            yield from plan_entries(source, file, detect_form(file, row_fields=KNOWN_BY), folder)

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Rows of a slice; a broken line is set apart alone."""
        images = ImageFolder(unit.details.extra)
        for key, fields in read_entries(unit):
            if isinstance(fields, Rejected):
                yield fields
            else:
                yield from read_drafts(unit, key, partial(read_own_row, unit, fields), images, changes)


@dataclass(frozen=True)
class TableDetails:
    """Fields of a slice of a table, as a worker gets them.

    Attributes:
        is_parquet: else it is an Arrow file.
        damage: the file cannot be read: the reason.
    """

    is_parquet: bool
    damage: str = ""


@dataclass(frozen=True)
class TableReader:
    """Parquet files, Arrow files, or a folder that ``datasets`` saved.

    The ``image`` column holds encoded bytes, a struct of ``bytes`` and ``path``, or paths below ``images=``.
    """

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per Arrow file, or per ``ENTRIES_PER_UNIT`` rows and more of a Parquet file."""
        if source.images:
            find_image_folder(source, storage.Location.parse(source.input), BESIDE)
        num_units = 0
        for file in find_tables(source):
            for unit in _plan_table(SourceUnit.of_file(source, file)):
                num_units += 1
                yield unit
        if num_units == 0:
            raise SettingsError(f"input={source.input!r} holds no entries: its tables have no rows.")

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Rows of a slice."""
        if unit.details.damage:
            yield Rejected("", unit.shard, unit.details.damage)
            return
        folder = storage.Location.parse(unit.source.images) if unit.source.images else None
        images = ImageFolder(folder)
        number = unit.first
        try:
            for batch in map(_without_times, _batches(unit)):
                batch.validate(full=True)  # offsets that point out of a damaged file would crash the process
                for fields in batch.to_pylist():
                    drafts = partial(read_own_row, unit, fields)
                    yield from read_drafts(unit, f"row {number}", drafts, images, changes)
                    number += 1
        except _ARROW_ERRORS as error:
            yield Rejected("", unit.shard, f"the table cannot be read after row {number}: {_damage(error)}")


_ARROW_ERRORS = (pa.ArrowException, UnicodeDecodeError, OSError)


def _plan_table(unit: SourceUnit) -> Iterator[SourceUnit]:
    try:
        if _is_parquet(unit.file):
            yield from _row_groups(replace(unit, details=TableDetails(is_parquet=True)))
        elif _has_rows(unit := replace(unit, details=TableDetails(is_parquet=False))):
            yield unit
    except _ARROW_ERRORS as error:
        yield replace(unit, details=TableDetails(False, f"no readable Parquet or Arrow file: {_damage(error)}"))


def _is_parquet(location: storage.Location) -> bool:
    with storage.open_file(location) as stream:
        return bool(stream.read(4) == b"PAR1")


def _has_rows(unit: SourceUnit) -> bool:
    return any(batch.num_rows for batch in _batches(unit))


def _damage(error: Exception) -> str:
    """Description of a table's damage. Arrow raises a plain ``OSError`` without a number for damaged pages, too.

    Raises:
        OSError: it is the disk or the network: that must not cost rows.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
    return str(error)


def _row_groups(unit: SourceUnit) -> Iterator[SourceUnit]:
    """Parts of a Parquet file of ``ENTRIES_PER_UNIT`` rows and more."""
    with storage.open_file(unit.file) as stream:
        metadata = pq.ParquetFile(stream).metadata
    start = first = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        is_last = group == metadata.num_row_groups - 1
        if rows > first and (rows - first >= ENTRIES_PER_UNIT or is_last):
            yield replace(unit, start=start, stop=group + 1, first=first)
            start, first = group + 1, rows


def _batches(unit: SourceUnit) -> Iterator[pa.RecordBatch]:
    with storage.open_file(unit.file) as file:
        if unit.details.is_parquet:
            groups = list(range(unit.start, unit.stop))
            yield from _open_parquet(file, groups).iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
            return
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:  # the stream format, which `datasets` writes, has no closing index
            file.seek(0)
            yield from (batch.slice(i, _BATCH_ROWS) for batch in pa.ipc.open_stream(file) for i in _starts(batch))
            return
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            yield from (batch.slice(i, _BATCH_ROWS) for i in _starts(batch))


def _open_parquet(file: pa.NativeFile, groups: Sequence[int]) -> pq.ParquetFile:
    """A file to read some row groups of: at once where they are small, since that is few requests in a bucket, else in
    pieces. pandas writes a million rows into one group, with their images."""
    metadata = pq.read_metadata(file)
    if sum(metadata.row_group(group).total_byte_size for group in groups) < _READ_AT_ONCE:
        return pq.ParquetFile(file, metadata=metadata)
    return pq.ParquetFile(file, metadata=metadata, pre_buffer=False, buffer_size=storage.COPY_BYTES)


def _without_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Columns that a row may need: times that Python has no type for, as of the year 300,000, would end the run."""
    return batch.select([i for i, field in enumerate(batch.schema) if not pa.types.is_temporal(field.type)])


def _starts(batch: pa.RecordBatch) -> range:
    return range(0, batch.num_rows, _BATCH_ROWS)
