"""The GPU benchmark's sections at a tiny size on the CPU: every case runs, and the time limit holds."""

from __future__ import annotations

import json

import pytest

from tests.paths import ROOT


@pytest.fixture(scope="module")
def gpu_train():
    import importlib
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("gpu_train")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_every_case_of_training_runs(gpu_train, capsys):
    rows = gpu_train.train_section(60, size="tiny", device="cpu")
    assert not [row for row in rows if row.value is None]
    what = {row.what: row for row in rows}
    assert what["ours, cached: times plain"].floor == 4.0 and what["ours, inline: times plain"].floor == 2.5
    assert what["448 px mix, ours, inline: times plain"].floor == 3.0
    assert what["loss, compiled - uncompiled"].value < 0.01
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["what"] for line in printed] == [row.what for row in rows]
    assert gpu_train.table(rows).count("\n") == len(rows) + 1


def test_every_case_of_memory_runs(gpu_train):
    rows = gpu_train.memory_section(60, size="tiny", device="cpu")
    assert len(rows) == 10
    assert all("planned" in row.note and "Error" not in row.note and "memory;" not in row.note for row in rows)


def test_rows_say_whether_what_was_wanted_was_reached(gpu_train):
    row = gpu_train.Row
    assert row("s", "w", 5.0, "%", 0, "", 10).verdict == "yes" and row("s", "w", 11.0, "%", 0, "", 10).verdict == "NO"
    assert row("s", "w", None, "%", 0).verdict == "NO" and row("s", "w", None, "%").verdict == ""
    assert row("s", "w", 5.0, "ms", ceiling=4.0).verdict == "NO"


def test_cases_without_time_are_named(gpu_train):
    clock_rows = gpu_train.Rows("train")
    assert not gpu_train.Clock(clock_rows, 5).allows("a long case", 60)
    assert clock_rows[0].value is None and "left out" in clock_rows[0].note
    assert gpu_train.Clock(clock_rows, 5).allows("a short case", 1)
