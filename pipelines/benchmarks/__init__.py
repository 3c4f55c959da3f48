"""Benchmarks by name."""

from __future__ import annotations

from pipelines.benchmarks.base import Benchmark, Question
from pipelines.benchmarks.miniature import MINIATURE

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in MINIATURE}
"""Every benchmark."""

GROUPS: dict[str, tuple[str, ...]] = {"miniature": tuple(benchmark.name for benchmark in MINIATURE)}
"""Names that stand for several."""


def find_benchmarks(names: str | list[str]) -> list[Benchmark]:
    """Look benchmarks up by name or group.

    Raises:
        ValueError: a name is unknown.
    """
    wanted: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        wanted += GROUPS.get(name, (name,))
    unknown = [name for name in wanted if name not in BENCHMARKS]
    if unknown:
        raise ValueError(f"benchmark {unknown[0]!r} is unknown; known: {', '.join([*GROUPS, *BENCHMARKS])}.")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


__all__ = ["BENCHMARKS", "GROUPS", "Benchmark", "Question", "find_benchmarks"]
