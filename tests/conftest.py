"""What all tests share; those that compare with recordings of the original need the recordings to be collected."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType

import hypothesis
import pytest

from tests.paths import GOLDEN, REALDATA, ROOT

_RECORDINGS = "test_golden*.py"
collect_ignore_glob = [] if GOLDEN.is_dir() and REALDATA.is_dir() else [f"**/{_RECORDINGS}"]


# The same examples in each run, and no bounds on seconds.
hypothesis.settings.register_profile(
    "alike", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("alike")

# What test modules import lives as long as the process: no collection of garbage has to look at it.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that are named on the command line are collected whatever is ignored."""
    for item in items:
        if collect_ignore_glob and item.path.match(_RECORDINGS):
            item.add_marker(pytest.mark.skip(reason=f"recordings of the original are not in {GOLDEN.parent}"))


def pytest_collection_finish() -> None:
    """Collect garbage again, of what tests make; and let every logger hand on its records.

    pytest adds its handlers to each logger that does not, six times per test; torch and Ray have a hundred of them.
    """
    for logger in logging.Logger.manager.loggerDict.values():
        logger.propagate = True  # placeholders of loggers take it, too
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # C++ libraries report what is never freed as leaked


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers of a test, its fixtures included, do not depend on the tests before it.

    Python's own stay random: Ray Serve names the versions of a deployment by them, and takes equal names for no change.
    """
    for seed in _seeds():
        seed(0)


@cache
def _seeds() -> tuple[Callable[[int], object], ...]:
    """Imported by the processes that run tests; the one that hands them out needs neither, and waits for no import.

    torch.manual_seed formats its callers three times where there is no GPU: a third of the time of a small test.
    """
    import numpy as np
    import torch

    return np.random.seed, torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def pytest_report_header() -> str:
    """One line that says whether the recordings are here."""
    if collect_ignore_glob:
        return f"recordings of the original are not in {GOLDEN.parent}: test_golden*.py are not collected"
    return f"recordings of the original: {GOLDEN.parent}"


@pytest.fixture(scope="module")
def import_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the benchmarks by name, as their commands do."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
