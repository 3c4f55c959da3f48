"""`make demo` in small: one process walks the whole way, tells what came out, and leaves nothing running."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest
import yaml

from tests.paths import ROOT
from tinygptv.miniature.backbones import BACKBONES

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not BACKBONES.is_dir(), reason="the miniature's backbones are not shipped"),
]

SMALL = {
    "train": {"max_steps": 2, "micro_batch_size": 16},
    "score": {"limit": 4, "baselines": True},
    "miniature": {"train_scenes": 40, "test_scenes": 8},
}


def _run(config, output):
    store = f"tracking_uri=sqlite:///{output}/mlflow.db"
    command = [sys.executable, "jobs/demo.py", "--config", str(config), f"output={output}", "port=0", store]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_whole_way_twice(tmp_path):
    values = yaml.safe_load((ROOT / "configs/mini.yaml").read_text())
    for section, changes in SMALL.items():
        values[section] = {**values.get(section, {}), **changes}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(values))
    output = tmp_path / "demo"

    first = _run(config, output)
    assert first.returncode == 0, first.stderr[-3000:]
    path = first.stdout.strip().splitlines()[-1]
    result = json.loads((output / "result.json").read_text())
    assert path == str(output / "result.json")
    assert set(result["losses"]) == {"1", "2", "3", "4"}
    assert result["scores"]["miniature_vqa"]["n"] == 8  # test_scenes: fewer than five times the limit
    assert result["scores"]["miniature_vqa"]["blind"] is not None
    assert isinstance(result["question"]["answer"], str)
    assert (output / "answer.png").stat().st_size > 1000
    assert (output / "artifact/quantization.json").is_file()
    for stage in (1, 2, 3, 4):
        assert (output / f"stage{stage}/checkpoint/manifest.json").is_file()
    assert "make mlflow" in first.stdout
    assert not _left_running(output)
    finished = {path: path.stat().st_mtime_ns for path in output.glob("stage*/checkpoint/*")}

    again = _run(config, output)
    assert again.returncode == 0, again.stderr[-3000:]
    second = json.loads((output / "result.json").read_text())
    assert second["losses"] == result["losses"]
    assert {path: path.stat().st_mtime_ns for path in output.glob("stage*/checkpoint/*")} == finished, "trained once"
    assert not _left_running(output)


def _left_running(output) -> list[str]:
    """Processes whose command line names the demo's folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(output) in line and process.info["pid"] != os.getpid():
            found.append(line)
    return found


def test_an_unknown_key_is_one_sentence():
    unknown = subprocess.run(
        [sys.executable, "jobs/demo.py", "--config", "configs/mini.yaml", "prot=1"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert unknown.returncode == 2
    assert "port" in unknown.stderr
    assert "Traceback" not in unknown.stderr
