"""The tree keeps its promises: imports run one way, heavy libraries stay in their places, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.settings import SECTIONS
from tests.paths import ROOT

PACKAGES = ("tinygptv", "pipelines", "jobs", "benchmarks", "tests")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
LAYERS = {
    "tinygptv": {"pipelines", "jobs", "benchmarks", "tests", "ray", "mlflow", "pyarrow", "fastapi"},
    "pipelines": {"jobs", "benchmarks", "tests"},
    "jobs": {"benchmarks", "tests"},
}
"""Package -> top-level names that nothing in it may import."""

MOST_LINES = 420


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in _imports(path)
        if name.split(".")[0] in LAYERS[package]
    ]
    assert not wrong


def test_mlflow_is_imported_in_one_folder():
    users = [
        p.parent.name
        for p in (ROOT / "pipelines").rglob("*.py")
        if any(n.split(".")[0] == "mlflow" for n in _imports(p))
    ]
    assert set(users) == {"tracking"}


def test_files_stay_small():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in MODULES if "tests" not in p.parts}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_importing_the_library_does_no_work():
    code = "import sys, tinygptv; print([m for m in ('torch', 'ray', 'mlflow', 'pipelines') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"ray", "mlflow", "pipelines"} & set(ast.literal_eval(loaded.stdout.strip().splitlines()[-1]))


def test_the_controller_of_a_run_loads_no_model_library():
    heavy = "('torch', 'transformers', 'peft')"
    code = f"import sys, pipelines.training.ray_entry; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_job_reads_every_configuration(config):
    for settings in SECTIONS.values():
        settings.load(config)


def test_jobs_are_short_and_documented():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        text = path.read_text()
        assert text.startswith("#!/usr/bin/env python3"), path
        assert path.stat().st_mode & 0o111, f"{path} lacks the run bit"
        assert len(text.splitlines()) <= 45, path
        assert f"jobs/{path.name}" in ast.get_docstring(ast.parse(text)), path
