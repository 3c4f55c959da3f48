"""The end of ingest: staged units become one shard set. Deterministic, and repeatable after a kill at any moment.

Duplicates are dropped here, because only here all rows are known. A staged file that loses no row and is large enough
becomes a shard under a second name; the others are gathered into new files. The manifest is written last: a folder with
a manifest is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.data.ingest.deduplicate import find_near_duplicates, first_occurrences
from pipelines.data.ingest.report import Totals, write_report
from pipelines.data.ingest.unit import UnitRecord, content_settings, read_index, read_record
from pipelines.data.shards import MANIFEST, Manifest, ShardInfo, ShardSet, ShardWriter
from pipelines.data.sources.base import Rejected
from pipelines.settings import PrepareDataSettings

QUARANTINE = "quarantine.jsonl"
REMOVED = "removed.jsonl"
NEAR_DUPLICATES = "near_duplicates.jsonl"

_SMALL_SHARE = 16
"""Staged files below this fraction of a shard's bounds are gathered; larger ones become shards as they are."""

_OPEN_UNITS = 128


@dataclass(frozen=True)
class Piece:
    """Rows of one staged file.

    Attributes:
        place: the file.
        info: its name, size and hash.
        rows: which rows stay; None for all.
    """

    place: str
    info: ShardInfo
    rows: np.ndarray | None

    @property
    def num_rows(self) -> int:
        """Rows that stay."""
        return self.info.rows if self.rows is None else len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Roughly what they take."""
        return self.info.bytes * self.num_rows // max(1, self.info.rows)


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be: where it goes and what it is made of."""

    place: str
    pieces: tuple[Piece, ...]


Write = Callable[[list[ShardPlan]], Iterable[ShardInfo]]
"""Writes shards, on the cluster or here, and gives their facts in the same order."""


@dataclass(frozen=True)
class Staging:
    """The finished units of a run.

    Attributes:
        folder: where their files lie.
        num_units: how many there are.
    """

    folder: str
    num_units: int

    def record(self, number: int) -> UnitRecord:
        """What became of a unit."""
        record = read_record(self.folder, number)
        assert record is not None, f"unit {number} was reported as finished but has no record"
        return record

    def index(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Facts of a unit's rows."""
        return read_index(self.folder, number, columns)

    def rejected(self) -> Iterator[Rejected]:
        """Samples that gave no row, in order."""
        for number in range(self.num_units):
            yield from self.record(number).rejected


@dataclass(frozen=True)
class _Rows:
    """Hashes of all rows of a source, in row order, and where each unit starts."""

    starts: np.ndarray
    content: np.ndarray
    image: np.ndarray
    perceptual: np.ndarray


def publish(settings: PrepareDataSettings, source: str, output: str, staging: Staging, write: Write) -> dict[str, Any]:
    """Make the shard set out of the staged units.

    Args:
        settings: bounds, and what happens to duplicates.
        source: data set name.
        output: folder of the set.
        staging: its units.
        write: writes shards.

    Returns:
        Counts of the result.

    Raises:
        DiskFullError: there is no room.
    """
    rows = _read_hashes(staging)
    first = first_occurrences(rows.content)
    stays = np.ones(len(first), dtype=bool) if settings.duplicates == "keep" else first == np.arange(len(first))
    plans, totals = _plan_shards(settings, output, staging, stays)
    shards = tuple(
        replace(info, statistics=statistics)
        for info, statistics in zip(write(plans), totals.shard_statistics(), strict=True)
    )
    near = find_near_duplicates(rows.image * stays, rows.perceptual, settings.near_duplicate_bits)
    names = _Names(staging, rows.starts)
    storage.write_lines(
        storage.join(output, NEAR_DUPLICATES),
        ({"id": names.row_id(n.row), "near": names.row_id(n.earlier), "bits": n.bits} for n in near),
    )
    dropped = np.flatnonzero(~stays)
    lost = _write_lists(source, output, staging, _repeated(names, dropped, first))
    counts = {"rows_out": int(stays.sum()), "duplicates": len(dropped), **lost, "near_duplicates": len(near)}
    counts["rows_in"] = counts["rows_out"] + len(dropped) + lost["filtered"] + lost["quarantined"]
    manifest = Manifest(source, shards, counts, content_settings(settings))
    _remove_stale_shards(output, {shard.file for shard in shards})
    write_report(output, ShardSet(output, manifest), totals)
    storage.write_atomically(storage.join(output, MANIFEST), manifest.to_json())
    return counts


def write_shard(plan: ShardPlan) -> ShardInfo:
    """Write one shard: a second name for a staged file that is one already, else a new file.

    Raises:
        DiskFullError: there is no room.
    """
    name = storage.file_name(plan.place)
    if len(plan.pieces) == 1 and plan.pieces[0].rows is None:
        storage.link_or_copy(plan.pieces[0].place, plan.place)
        return replace(plan.pieces[0].info, file=name)
    writer = ShardWriter(plan.place)
    try:
        for piece in plan.pieces:
            for batch in _batches(piece):
                writer.write(batch)
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _batches(piece: Piece) -> Iterator[pa.RecordBatch]:
    filesystem, path = storage.resolve(piece.place)
    file = pa.memory_map(path) if storage.is_local(piece.place) else filesystem.open_input_file(path)
    with file:
        reader = pa.ipc.open_file(file)
        start = 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            if piece.rows is None:
                yield batch
            else:
                wanted = piece.rows[(piece.rows >= start) & (piece.rows < start + batch.num_rows)] - start
                if len(wanted):
                    yield batch.take(pa.array(wanted))
            start += batch.num_rows


def _read_hashes(staging: Staging) -> _Rows:
    starts = [0]
    content = [np.empty((0, 2), dtype=np.uint64)]
    image, perceptual = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
    for number in range(staging.num_units):
        index = staging.index(number, ["content_hash", "image_hash", "perceptual_hash"])
        starts.append(starts[-1] + index.num_rows)
        content.append(np.frombuffer(b"".join(index["content_hash"].to_pylist()), dtype=np.uint64).reshape(-1, 2))
        image.append(index["image_hash"].to_numpy().astype(np.uint64))
        perceptual.append(index["perceptual_hash"].to_numpy().astype(np.uint64))
    return _Rows(
        np.array(starts, dtype=np.int64), np.concatenate(content), np.concatenate(image), np.concatenate(perceptual)
    )


def _plan_shards(
    settings: PrepareDataSettings, output: str, staging: Staging, stays: np.ndarray
) -> tuple[list[ShardPlan], Totals]:
    """Share the rows that stay out among shards, in order, and count what each will hold."""
    plans: list[ShardPlan] = []
    totals = Totals()
    pieces: list[Piece] = []

    def close() -> None:
        if pieces:
            plans.append(ShardPlan(storage.join(output, f"part-{len(plans):05d}.arrow"), tuple(pieces)))
            pieces.clear()
            totals.next_shard()

    row = 0
    for number in range(staging.num_units):
        record = staging.record(number)
        index = staging.index(number)
        place = 0
        for info in record.files:
            wanted = stays[row : row + info.rows]
            piece = Piece(
                storage.join(staging.folder, info.file), info, None if wanted.all() else np.flatnonzero(wanted)
            )
            if piece.num_rows:
                small = _is_small(piece, settings)
                if not (small and _fits(pieces, piece, settings)):
                    close()
                pieces.append(piece)
                totals.add(index.slice(place, info.rows).filter(pa.array(wanted)))
                if not small:
                    close()
            place += info.rows
            row += info.rows
        totals.add_rejected(record.rejected)
    close()
    return plans, totals


def _is_small(piece: Piece, settings: PrepareDataSettings) -> bool:
    """Whether it is worth copying the rows, to have fewer and larger shards."""
    return (
        piece.num_rows * _SMALL_SHARE < settings.shard_rows and piece.num_bytes * _SMALL_SHARE < settings.shard_mb << 20
    )


def _fits(pieces: list[Piece], piece: Piece, settings: PrepareDataSettings) -> bool:
    together = [*pieces, piece]
    return (
        sum(held.num_rows for held in together) <= settings.shard_rows
        and sum(held.num_bytes for held in together) <= settings.shard_mb << 20
    )


class _Names:
    """Names of rows, looked up in the units' files; the units used last stay open."""

    def __init__(self, staging: Staging, starts: np.ndarray) -> None:
        self.starts = starts
        self._ids = lru_cache(_OPEN_UNITS)(lambda number: staging.index(number, ["id"])["id"])
        self._record = lru_cache(_OPEN_UNITS)(staging.record)

    def row_id(self, row: int) -> str:
        number = self._unit(row)
        return self._ids(number)[row - int(self.starts[number])].as_py()

    def shard_and_key(self, row: int) -> tuple[str, str]:
        record = self._record(self._unit(row))
        return record.shard, self.row_id(row).removeprefix(record.id_prefix)

    def _unit(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1


def _repeated(names: _Names, dropped: np.ndarray, first: np.ndarray) -> Iterator[Rejected]:
    """The duplicates that were dropped, each with the row that stays."""
    for row in dropped:
        shard, key = names.shard_and_key(int(row))
        yield Rejected(key, shard, f"same as {names.row_id(int(first[row]))}", "duplicate")


def _write_lists(source: str, output: str, staging: Staging, repeated: Iterator[Rejected]) -> dict[str, Any]:
    """Write what gave no row, and why: quarantine.jsonl and removed.jsonl. Returns their counts."""
    filters: Counter[str] = Counter()

    def line(found: Rejected, **more: str) -> dict[str, str]:
        return {"source": source, "shard": found.shard, "key": found.key, **more, "reason": found.reason}

    def removed() -> Iterator[dict[str, str]]:
        for found in (found for found in staging.rejected() if found.filter):
            filters[found.filter] += 1
            yield line(found, filter=found.filter)
        yield from (line(found, filter=found.filter) for found in repeated)

    quarantined = (line(found) for found in staging.rejected() if not found.filter)
    num_quarantined = storage.write_lines(storage.join(output, QUARANTINE), quarantined)
    storage.write_lines(storage.join(output, REMOVED), removed())
    return {"filtered": filters.total(), "quarantined": num_quarantined, "filters": dict(sorted(filters.items()))}


def _remove_stale_shards(output: str, wanted: set[str]) -> None:
    """Remove shards that an earlier or interrupted run left in the folder."""
    for name in storage.list_names(output):
        if name.startswith("part-") and name.endswith(".arrow") and name not in wanted:
            storage.remove_file(storage.join(output, name))
