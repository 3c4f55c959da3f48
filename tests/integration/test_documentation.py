"""The documentation site builds offline without a warning; the notebook's cells run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

NOTEBOOK = ROOT / "docs/tutorials/miniature.ipynb"


def test_the_site_builds_offline(tmp_path):
    pytest.importorskip("mkdocs")
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, check=False, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    index = json.loads((tmp_path / "search/search_index.json").read_text())
    pages = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"architecture.html", "tutorials/notebook.html", "reference/model.html", "CHANGELOG.html"} <= pages
    assert any("tinygptv.config.TinyGPTVConfig.phi2" in entry["location"] for entry in index["docs"])
    assert 'class="mermaid"' in (tmp_path / "architecture.html").read_text()
    assert "data:image/png;base64" in (tmp_path / "tutorials/notebook.html").read_text()


@pytest.mark.timeout(900)
def test_the_notebook_runs(tmp_path):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join([*code, 'figure.savefig("curve.png")']))
    environment = {**os.environ, "MPLBACKEND": "Agg", "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, script], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    assert "truth:" in printed[0] and printed[-1].startswith("loss ")
    first, last = (float(number) for number in printed[-1].split(";")[0].removeprefix("loss ").split(" -> "))
    before, after = (float(share.rstrip("%")) for share in printed[-1].split(": ")[1].split(" -> "))
    assert last < first / 3 and after > before + 20
    assert (tmp_path / "curve.png").stat().st_size > 5_000


def test_the_notebook_shows_what_it_prints():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell["outputs"] for cell in cells if cell["cell_type"] == "code")
