#!/usr/bin/env python3
"""What do a start and a step cost at LAION-400M's size (400 million rows, 41,000 shards), measured without its data?

python benchmarks/scale.py [--shards 41000] [--rows 9756] [--hashes 4000000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from note import LoadWatch, machine, peak_memory, seconds_of

from pipelines.data.ingest.deduplicate import first_occurrences
from pipelines.data.ingest.inputs import SetInputs
from pipelines.data.shard_format import MANIFEST, Manifest, ShardInfo
from pipelines.data.shards import ShardSet
from pipelines.data.sources import locate
from pipelines.data.sources.base import SourceUnit
from pipelines.settings import PrepareDataSettings
from tinygptv.data.mixture import Mixture, MixtureSource

STEPS = 200
STATISTICS = {"words": {"mean": 9.1, "most": 64}, "sides": {"mean": 353.0, "most": 448}}


def step_ms(shards: int, rows: int) -> tuple[float, float]:
    """Milliseconds of the first step, which lays out an epoch, and the median of those after it."""
    mixture = Mixture((MixtureSource("laion", 1.0, 64, (rows,) * shards),), seed=0)
    first = seconds_of(lambda: mixture.step(10_000))
    later = [seconds_of(lambda k=k: mixture.step(k)) for k in range(10_001, 10_001 + STEPS)]
    return 1e3 * first, 1e3 * statistics.median(later)


def plan_seconds(folder: Path, tars: int) -> tuple[float, float]:
    """Seconds until an ingest of so many tars knows its units of work, and until it knows whether it ran before."""
    for number in range(tars):
        (folder / f"{number:05d}.tar").write_bytes(b"")
    settings = PrepareDataSettings(source="laion", input=f"{folder}/*.tar", output=str(folder / "out"))
    units: list[SourceUnit] = []

    def plan() -> None:
        source, given = locate(settings)
        units.extend(source.reader.plan(given))

    planning = seconds_of(plan)
    assert len(units) == tars
    return planning, seconds_of(lambda: SetInputs.of(locate(settings)[1], units, settings))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=41_000)
    parser.add_argument("--rows", type=int, default=9_756)
    parser.add_argument("--hashes", type=int, default=4_000_000)
    options = parser.parse_args()
    load = LoadWatch()
    lines = []
    for shards in (500, options.shards):
        first, median = step_ms(shards, options.rows)
        lines.append(f"mixture.step, 64 samples, {shards:,} shards | first {first:.1f} ms, then {median:.2f} ms")
    infos = tuple(
        ShardInfo(f"part-{n:05d}.arrow", options.rows, 250_000_000, f"{n:064x}", STATISTICS)
        for n in range(options.shards)
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Manifest("laion", infos).to_json()
        Path(folder, MANIFEST).write_bytes(data)
        reading = seconds_of(lambda: Manifest.read(folder))
        opening = seconds_of(lambda: ShardSet(folder, Manifest("laion", infos)))
    lines.append(
        f"manifest of {options.shards:,} shards, {len(data) / 1e6:.0f} MB | read {reading:.2f} s, set {opening:.2f} s"
    )
    with tempfile.TemporaryDirectory() as folder:
        planning, comparing = plan_seconds(Path(folder), options.shards)
    lines.append(f"ingest of {options.shards:,} tars | units {planning:.2f} s, compared with before {comparing:.2f} s")
    hashes = np.random.default_rng(0).integers(0, 2**63, size=(options.hashes, 2), dtype=np.uint64)
    before = peak_memory()
    spent = seconds_of(lambda: first_occurrences(hashes))
    more = (peak_memory() - before) / options.hashes
    lines.append(f"duplicates among {options.hashes:,} rows | {spent:.1f} s, {more:.0f} bytes more per row at the peak")
    print(machine(), load, *lines, sep="\n")


if __name__ == "__main__":
    main()
