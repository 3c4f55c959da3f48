"""The GPU benchmarks run at reduced size on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.integration


def test_all_sections_run_on_a_cpu(tmp_path):
    sections = "decode,small_card,first_token,answers,products"
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--size", "tiny", "--device", "cpu", "--limit-s", "900"]
    done = subprocess.run(
        [*command, "--only", sections, "--output", tmp_path / "gpu.md"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert "Traceback" not in done.stderr
    assert {row["section"] for row in rows} >= {"decode", "small card", "first_token", "answers", "products"}
    assert next(row for row in rows if row["what"].startswith("fp32: equal answers"))["reached"] == "yes"
    text = (tmp_path / "gpu.md").read_text()
    assert "--size tiny" in text and "| decode | bf16, engine, 1 |" in text


def test_every_case_of_training_runs(import_benchmark, capsys):
    rows = import_benchmark("gpu_train").train_section(900, size="tiny", device="cpu")
    assert not [row for row in rows if row.value is None]
    what = {row.what: row for row in rows}
    assert what["ours, cached: times plain"].floor == 4.0 and what["ours, inline: times plain"].floor == 2.5
    assert what["448 px mix, ours, inline: times plain"].floor == 3.0
    assert what["loss, compiled - uncompiled"].value < 0.01
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["what"] for line in printed] == [row.what for row in rows]
    assert import_benchmark("gpu_rows").table(rows).count("\n") == len(rows) + 1


def test_every_case_of_memory_runs(import_benchmark):
    rows = import_benchmark("gpu_memory").memory_section(900, size="tiny", device="cpu")
    assert len(rows) == 13
    assert all("planned" in row.note and "Error" not in row.note and "memory;" not in row.note for row in rows)
