"""Pytest plugin of ``tests.mutants``: what makes a mutant cheap.

mutmut's fork server collects the tests once and forks a process per mutant. What the server has loaded is frozen, so
that the garbage collection of a fork does not copy it; and the quick tests come first, as one red test is enough.
"""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from pathlib import Path

import pytest

TIMES = Path("mutmut-stats.json")
"""mutmut's own file in the folder in which it runs pytest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the least time first, and in each the quickest test first."""
    if not TIMES.is_file():
        return
    seconds: dict[str, float] = json.loads(TIMES.read_text())["duration_by_test"]
    of_file: dict[str, float] = defaultdict(float)
    for item in items:
        of_file[item.path.name] += seconds.get(item.nodeid, 0.0)
    items.sort(key=lambda item: (of_file[item.path.name], item.path.name, seconds.get(item.nodeid, 0.0)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """In the fork server, which only collects: keep the garbage collector away from what is loaded."""
    if session.config.option.collectonly:
        gc.collect()
        gc.freeze()
