"""Benchmarks by name."""

from __future__ import annotations

from pipelines.evaluation.benchmarks.base import Benchmark, Outcome, Question
from pipelines.evaluation.benchmarks.choices import CHOICES
from pipelines.evaluation.benchmarks.grounding import DATA_SETS, REFERRING
from pipelines.evaluation.benchmarks.miniature import MINIATURE
from pipelines.evaluation.benchmarks.vqa import SHORT_ANSWERS
from pipelines.settings import SettingsError
from pipelines.settings.near_match import near_match

BENCHMARKS: dict[str, Benchmark] = {b.name: b for b in (*SHORT_ANSWERS, *CHOICES, *REFERRING, *MINIATURE)}
"""Every benchmark."""

GROUPS: dict[str, tuple[str, ...]] = {
    "miniature": tuple(benchmark.name for benchmark in MINIATURE),
    "paper": ("gqa", "vsr", "iconqa", "vizwiz", "hateful_memes"),
    "aokvqa": ("aokvqa_direct", "aokvqa_choice"),
    "pope": ("pope_random", "pope_popular", "pope_adversarial"),
    "rec": tuple(benchmark.name for benchmark in REFERRING),
    **{name: tuple(f"{name}_{split}" for split in data.splits) for name, data in DATA_SETS.items()},
}
"""Names that stand for several; ``paper`` is the paper's own table."""


def find_benchmarks(names: str | list[str]) -> list[Benchmark]:
    """Look benchmarks up by name or group.

    Raises:
        SettingsError: a name is unknown.
    """
    wanted: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        wanted += GROUPS.get(name, (name,))
    for name in wanted:
        if name not in BENCHMARKS:
            if name == "own":
                raise SettingsError("benchmark=own is scored alone: give it no other benchmarks beside.")
            raise SettingsError(f"benchmark {name!r} is unknown; {near_match(name, ['own', *GROUPS, *BENCHMARKS])}")
    return [BENCHMARKS[name] for name in dict.fromkeys(wanted)]


__all__ = ["BENCHMARKS", "GROUPS", "Benchmark", "Outcome", "Question", "find_benchmarks"]
