"""Scoring on a cluster: the same answers as in one process, and a kill loses no finished unit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipelines.evaluation.run import evaluate
from tests.killed_jobs import run_killed
from tests.paths import ROOT
from tests.serving_model import save_checkpoint
from tests.unit.evaluation.test_run import predictions, settings
from tinygptv.miniature.writers import write_world

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 1, 16, sources=())
    return folder


def test_actors_answer_as_one_process_does(ray_cluster, checkpoint, world, tmp_path):
    names = ["miniature_vqa", "miniature_refer"]
    evaluate(settings(checkpoint, world, tmp_path / "inline", benchmark=names))
    evaluate(settings(checkpoint, world, tmp_path / "ray", benchmark=names, num_workers=2))
    assert predictions(tmp_path / "ray") == predictions(tmp_path / "inline")
    ours, theirs = (json.loads((tmp_path / n / "result.json").read_text())["benchmarks"] for n in ("ray", "inline"))
    assert ours == theirs


def test_a_kill_loses_no_finished_unit(checkpoint, world, tmp_path):
    output = tmp_path / "score"
    keys = f"checkpoint={checkpoint} data={world} output={output} benchmark=miniature_grounding num_workers=0"
    keys += " threads_per_worker=1 batch_size=2 tracking_uri=none"
    run_killed("jobs/score.py", keys.split(), "pipelines.evaluation.worker:write_answers", 3)
    times = {path: path.stat().st_mtime_ns for path in (output / "answers").glob("*.jsonl")}
    assert len(times) == 2 and not (output / "result.json").exists()

    command = [sys.executable, "jobs/score.py", *keys.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == str(output / "result.json")
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    evaluate(settings(checkpoint, world, tmp_path / "straight", benchmark="miniature_grounding"))
    assert predictions(output) == predictions(tmp_path / "straight")
