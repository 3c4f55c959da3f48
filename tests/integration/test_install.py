"""The wheel: it brings scripts, configurations and data, and its command works outside of the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_wheel_works_without_the_source_tree(tmp_path):
    for name in ("tinygptv", "pipelines", "jobs", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, tmp_path / "source" / name)
    words = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tmp_path / "source")]
    subprocess.run([sys.executable, "-m", *words], check=True, env={**os.environ, "PYTHONPATH": ""})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {f"pipelines/jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")} <= names
    assert {f"pipelines/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert {"pipelines/fetch/datasets.toml", "tinygptv/convert/sources/weights.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "jobs/"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    code = "import sys; from pipelines.console import main; sys.exit(main(sys.argv[1:]))"
    plan = ["plan-memory", "--config", "configs/paper.yaml", f"output={tmp_path / 'plan'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, *plan], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan/result.json").is_file() and "recipe paper" in done.stdout
