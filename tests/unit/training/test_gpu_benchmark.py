"""Rows of the GPU benchmark: what was reached, and what there was no time for."""

from __future__ import annotations


def test_rows_say_whether_what_was_wanted_was_reached(import_benchmark):
    row = import_benchmark("gpu_rows").Row
    assert row("s", "w", 5.0, "%", 0, "", 10).verdict == "yes" and row("s", "w", 11.0, "%", 0, "", 10).verdict == "NO"
    assert row("s", "w", None, "%", 0).verdict == "NO" and row("s", "w", None, "%").verdict == ""
    assert row("s", "w", 5.0, "ms", ceiling=4.0).verdict == "NO"


def test_cases_without_time_are_named(import_benchmark):
    gpu_rows = import_benchmark("gpu_rows")
    clock_rows = gpu_rows.Rows("train")
    assert not gpu_rows.Clock(clock_rows, 5).allows("a long case", 60)
    assert clock_rows[0].value is None and "left out" in clock_rows[0].note
    assert gpu_rows.Clock(clock_rows, 5).allows("a short case", 1)
