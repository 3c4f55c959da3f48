"""Tests that compare with recordings of the original are not collected where the recordings are missing."""

from __future__ import annotations

from tests.paths import GOLDEN, REALDATA

collect_ignore_glob = [] if GOLDEN.is_dir() and REALDATA.is_dir() else ["**/test_golden*.py"]


def pytest_report_header() -> str:
    """One line that says whether the recordings are here."""
    if collect_ignore_glob:
        return f"recordings of the original are not in {GOLDEN.parent}: test_golden*.py are not collected"
    return f"recordings of the original: {GOLDEN.parent}"
