"""Samples that gave no row: the staged units of a run, and the lists that are written from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.data.ingest.deduplicate import NearDuplicate
from pipelines.data.ingest.inputs import QUARANTINE
from pipelines.data.ingest.staging import UnitRecord, read_index, read_record
from pipelines.data.sources.base import Rejected

REMOVED = "removed.jsonl"
NEAR_DUPLICATES = "near_duplicates.jsonl"

_NAMED_AT_ONCE = 1 << 20
"""Rows whose names are looked up together: they take some 100 MB."""


@dataclass(frozen=True)
class Staging:
    """The finished units of a run.

    Attributes:
        folder: of their files.
        num_units: how many there are.
    """

    folder: str
    num_units: int

    def record(self, number: int) -> UnitRecord:
        """Outcome of a unit."""
        record = read_record(self.folder, number)
        assert record is not None, f"unit {number} was reported as finished but has no record"
        return record

    def index(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Index of a unit's rows."""
        return read_index(self.folder, number, columns)

    def rejected(self) -> Iterator[Rejected]:
        """Samples that gave no row, in order."""
        for number in range(self.num_units):
            yield from self.record(number).rejected

    def missing(self) -> list[tuple[str, str]]:
        """Locations of missing images, the first ones of each unit."""
        return [at for number in range(self.num_units) for at in self.record(number).missing]


class RowNames:
    """Names of rows, looked up in the units' files: many at once, so that each file is opened once for them."""

    def __init__(self, staging: Staging, starts: np.ndarray) -> None:
        self._staging = staging
        self._starts = starts
        self._record = lru_cache(1)(staging.record)

    def ids(self, rows: np.ndarray) -> list[str]:
        """Ids of rows, counted through all units, in the order asked for."""
        units = self._units(rows)
        order = np.argsort(units, kind="stable")
        found = np.empty(len(rows), dtype=object)
        for places in np.split(order, np.flatnonzero(np.diff(units[order])) + 1) if len(rows) else ():
            number = int(units[places[0]])
            column = self._staging.index(number, ["id"])["id"]
            found[places] = column.take(pa.array(rows[places] - self._starts[number])).to_pylist()
        return found.tolist()

    def shards_and_keys(self, rows: np.ndarray) -> Iterator[tuple[str, str]]:
        """Input file of each row, and its key there."""
        for number, row_id in zip(self._units(rows).tolist(), self.ids(rows), strict=True):
            record = self._record(number)
            yield record.shard, row_id.removeprefix(record.id_prefix)

    def _units(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1


def near_lines(names: RowNames, near: Sequence[NearDuplicate]) -> Iterator[dict[str, str | int]]:
    """Lines of near_duplicates.jsonl."""
    for start in range(0, len(near), _NAMED_AT_ONCE):
        part = near[start : start + _NAMED_AT_ONCE]
        ids = names.ids(np.array([found.row for found in part]))
        earlier = names.ids(np.array([found.earlier for found in part]))
        for row_id, like, found in zip(ids, earlier, part, strict=True):
            yield {"id": row_id, "near": like, "bits": found.bits}


def repeated_rows(names: RowNames, dropped: np.ndarray, first: np.ndarray) -> Iterator[Rejected]:
    """The duplicates that were dropped, in row order, each with the row that stays."""
    for start in range(0, len(dropped), _NAMED_AT_ONCE):
        rows = dropped[start : start + _NAMED_AT_ONCE]
        for (shard, key), same in zip(names.shards_and_keys(rows), names.ids(first[rows]), strict=True):
            yield Rejected(key, shard, f"same as {same}", "duplicate")


def write_lists(source: str, output: str, staging: Staging, repeated: Iterator[Rejected]) -> tuple[dict[str, int], int]:
    """Write what gave no row, and why: quarantine.jsonl and removed.jsonl.

    Returns:
        Samples per filter, and the number of quarantined ones.
    """
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
    return dict(sorted(filters.items())), num_quarantined
