"""Samples that gave no row: the staged units of a run, and the lists that are written from them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.data.ingest.inputs import QUARANTINE
from pipelines.data.ingest.staging import UnitRecord, read_index, read_record
from pipelines.data.sources.base import Rejected

REMOVED = "removed.jsonl"
NEAR_DUPLICATES = "near_duplicates.jsonl"

_OPEN_UNITS = 128


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

    def changes(self) -> dict[str, int]:
        """Rows that were kept, but changed, by the kind of change."""
        found: Counter[str] = Counter()
        for number in range(self.num_units):
            found.update(self.record(number).changes)
        return dict(sorted(found.items()))

    def missing(self) -> list[tuple[str, str]]:
        """Locations of missing images, the first ones of each unit."""
        return [at for number in range(self.num_units) for at in self.record(number).missing]


class RowNames:
    """Names of rows, looked up in the units' files; the units used last stay open."""

    def __init__(self, staging: Staging, starts: np.ndarray) -> None:
        self._starts: list[int] = starts.tolist()
        self._ids = lru_cache(_OPEN_UNITS)(lambda number: staging.index(number, ["id"])["id"])
        self._record = lru_cache(_OPEN_UNITS)(staging.record)

    def row_id(self, row: int) -> str:
        """Id of a row, counted through all units."""
        number = self._unit(row)
        return str(self._ids(number)[row - self._starts[number]].as_py())

    def shard_and_key(self, row: int) -> tuple[str, str]:
        """Input file of a row, and its key there."""
        record = self._record(self._unit(row))
        return record.shard, self.row_id(row).removeprefix(record.id_prefix)

    def _unit(self, row: int) -> int:
        return bisect_right(self._starts, row) - 1


def repeated_rows(names: RowNames, dropped: np.ndarray, first: np.ndarray) -> Iterator[Rejected]:
    """The duplicates that were dropped, each with the row that stays."""
    for row in dropped:
        shard, key = names.shard_and_key(int(row))
        yield Rejected(key, shard, f"same as {names.row_id(int(first[row]))}", "duplicate")


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
