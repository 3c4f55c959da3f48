"""Publishing: staged units become one shard set. Deterministic, and repeatable after a kill at any moment.

Duplicates are dropped here, because only here all rows are known. A staged file that loses no row and is large enough
becomes a shard under a second name; the others are gathered into new files. The manifest is written last: a folder with
a manifest is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.data.ingest.deduplicate import find_near_duplicates, first_occurrences
from pipelines.data.ingest.inputs import QUARANTINE
from pipelines.data.ingest.lists import (
    NEAR_DUPLICATES,
    REMOVED,
    RowNames,
    Staging,
    near_lines,
    repeated_rows,
    write_lists,
)
from pipelines.data.ingest.report import Totals, write_report
from pipelines.data.ingest.staging import content_settings
from pipelines.data.shard_format import MANIFEST, Manifest, RowCounts, ShardInfo, ShardWriter
from pipelines.data.shards import ShardSet
from pipelines.settings import PrepareDataSettings

logger = logging.getLogger(__name__)

_SMALL_SHARE = 16
"""Staged files below this fraction of a shard's bounds are gathered; larger ones become shards as they are."""

_MUCH = 0.1
"""Share of quarantined samples above which a warning gives the commonest reason."""


@dataclass(frozen=True)
class Piece:
    """Rows of one staged file.

    Attributes:
        location: the file.
        info: its name, size and hash.
        rows: which rows stay; None for all.
    """

    location: str
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
    """One shard to be written: its location and the pieces that it is made of."""

    location: str
    pieces: tuple[Piece, ...]


Write = Callable[[list[ShardPlan]], Iterable[ShardInfo]]
"""Writes shards, on the cluster or here, and gives their lines of the manifest in the same order."""


class NothingKeptError(ValueError):
    """No sample of the input could be kept; the text says what was wrong with most of them."""


@dataclass(frozen=True)
class _Rows:
    """Hashes of all rows of a source, in row order, and where each unit starts."""

    starts: np.ndarray
    content: np.ndarray
    image: np.ndarray
    perceptual: np.ndarray


def publish(settings: PrepareDataSettings, source: str, output: str, staging: Staging, write: Write) -> RowCounts:
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
        NothingKeptError: no sample could be kept; the lists of what was set apart are written, the manifest is not.
        DiskFullError: there is no room.
    """
    rows = _read_hashes(staging)
    first = first_occurrences(rows.content)
    stays = np.ones(len(first), dtype=bool) if settings.duplicates == "keep" else first == np.arange(len(first))
    plans, totals = _plan_shards(settings, output, staging, stays)
    shards = tuple(
        replace(info, statistics=statistics)
        for info, statistics in zip(write(plans), totals.shard_statistics, strict=True)
    )
    near = find_near_duplicates(rows.image * stays, rows.perceptual, settings.near_duplicate_bits)
    names = RowNames(staging, rows.starts)
    storage.write_lines(storage.join(output, NEAR_DUPLICATES), near_lines(names, near))
    dropped = np.flatnonzero(~stays)
    filters, num_quarantined = write_lists(source, output, staging, repeated_rows(names, dropped, first))
    num_kept, num_filtered = int(stays.sum()), sum(filters.values())
    counts = RowCounts(
        rows_in=num_kept + len(dropped) + num_filtered + num_quarantined,
        rows_out=num_kept,
        duplicates=len(dropped),
        filtered=num_filtered,
        quarantined=num_quarantined,
        near_duplicates=len(near),
        filters=filters,
        changes=dict(sorted(totals.changes.items())),
    )
    _remove_stale_shards(output, {shard.file for shard in shards})
    if num_kept == 0:
        raise NothingKeptError(_nothing_kept(source, output, counts, totals))
    manifest = Manifest(source, shards, counts, content_settings(settings))
    write_report(output, ShardSet(output, manifest), totals)
    storage.write_atomically(storage.join(output, MANIFEST), manifest.to_json())
    _tell(source, output, counts, totals)
    return counts


def _nothing_kept(source: str, output: str, counts: RowCounts, totals: Totals) -> str:
    if not counts["rows_in"]:
        return f"the input of {source} holds no samples: is it the right one?"
    if counts["quarantined"] >= counts["filtered"] and totals.examples:
        reason, number = totals.reasons.most_common(1)[0]
        most = f"{number:,} of them, e.g.: {totals.examples[reason]}"
        where = QUARANTINE
    else:
        most = ", ".join(f"filter {name}: {number:,}" for name, number in counts["filters"].items())
        where = REMOVED
    return (
        f"none of the {counts['rows_in']:,} samples of {source} could be kept ({most}). Is it the right input? "
        f"{storage.join(output, where)} lists all."
    )


def _tell(source: str, output: str, counts: RowCounts, totals: Totals) -> None:
    """Count rows in and out, and say so where much was set apart, or texts were cut."""
    numbers = (counts["rows_in"], counts["rows_out"], counts["duplicates"], counts["filtered"], counts["quarantined"])
    logger.info(
        "%s: %s rows in, %s out; duplicates %s, filtered %s, quarantined %s", source, *(f"{n:,}" for n in numbers)
    )
    if counts["quarantined"] > _MUCH * counts["rows_in"]:
        reason, number = totals.reasons.most_common(1)[0]
        logger.warning(
            "%s: %s of %s samples (%.0f %%) are quarantined; the commonest reason (%s): %s. %s lists all.",
            source,
            f"{counts['quarantined']:,}",
            f"{counts['rows_in']:,}",
            100 * counts["quarantined"] / counts["rows_in"],
            f"{number:,}",
            totals.examples[reason],
            storage.join(output, QUARANTINE),
        )
    if counts["changes"]:
        changes = ", ".join(f"{name} {number:,}" for name, number in counts["changes"].items())
        logger.info("%s: rows that were kept, but changed: %s (docs/data_format.md)", source, changes)


def write_shard(plan: ShardPlan) -> ShardInfo:
    """Write one shard: a second name for a staged file that is one already, else a new file.

    Raises:
        DiskFullError: there is no room.
    """
    name = storage.file_name(plan.location)
    if len(plan.pieces) == 1 and plan.pieces[0].rows is None:
        storage.link_or_copy(plan.pieces[0].location, plan.location)
        return replace(plan.pieces[0].info, file=name)
    writer = ShardWriter(plan.location)
    try:
        for piece in plan.pieces:
            for batch in _batches(piece):
                writer.write(batch)
        return writer.close()
    except BaseException:
        writer.abort()
        raise


def _batches(piece: Piece) -> Iterator[pa.RecordBatch]:
    where = storage.Location.parse(piece.location)
    with pa.memory_map(where.path) if where.is_local else storage.open_file(where) as file:
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
        start = 0
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
                totals.add(index.slice(start, info.rows).filter(pa.array(wanted)))
                if not small:
                    close()
            start += info.rows
            row += info.rows
        totals.add_rejected(record.rejected)
        totals.changes.update(record.changes)
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


def _remove_stale_shards(output: str, wanted: set[str]) -> None:
    """Remove shards that an earlier or interrupted run left in the folder."""
    for name in storage.list_names(output):
        if name.startswith("part-") and name.endswith(".arrow") and name not in wanted:
            storage.remove_file(storage.join(output, name))
