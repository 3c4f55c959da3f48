"""The GPU benchmarks run at reduced size on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.integration


@pytest.mark.timeout(240)
def test_all_sections_run_on_a_cpu(tmp_path):
    sections = "decode,small_card,first_token,answers,products"
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--size", "tiny", "--device", "cpu", "--only", sections]
    done = subprocess.run(
        [*command, "--output", tmp_path / "gpu.md"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert "Traceback" not in done.stderr
    assert {row["section"] for row in rows} >= {"decode", "small card", "first_token", "answers", "products"}
    assert next(row for row in rows if row["what"].startswith("fp32: equal answers"))["reached"] == "yes"
    text = (tmp_path / "gpu.md").read_text()
    assert "--size tiny" in text and "| decode | bf16, engine, 1 |" in text
