"""Checkpoint folders on the hub: loaded by id and checked against their manifest, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipelines.miniature.tiny_training import make_rows, write_shard_set
from tests.hub_server import COMMIT, publish_repository, serve_files
from tests.paths import ROOT
from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.checkpoint import save_checkpoint
from tinygptv.training.stages import RECIPES

pytestmark = pytest.mark.integration

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "checkpoint"
    return save_checkpoint(target, make_model(), make_processor(), {"stage": 4, "recipe": "test"})


@pytest.fixture
def server(folder):
    """The folder as a repository."""
    with serve_files() as files:
        publish_repository(files, folder, REPO)
        yield files


def python(server, tmp_path, code):
    """Run code in a process of its own: the hub's address is read when its library is imported."""
    variables = {"HF_ENDPOINT": server.base, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_from_pretrained_takes_an_id(server, tmp_path, folder):
    code = f"""
import tinygptv
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({REPO!r})
processor = AutoProcessor.from_pretrained({REPO!r})
print(type(model).__name__, type(processor).__name__, sum(p.numel() for p in model.parameters()))
"""
    name, processor, count = python(server, tmp_path, code).split()
    assert (name, processor) == ("TinyGPTVForConditionalGeneration", "TinyGPTVProcessor") and int(count) > 0


def test_a_repository_is_downloaded_checked_and_loaded(server, tmp_path):
    code = f"""
from pipelines.node_cache import local_checkpoint
from tinygptv.checkpoint import folders
from tinygptv.inference.loading import load_for_inference
hashed, hash_file = [], folders.hash_file
folders.hash_file = lambda path: hashed.append(path.name) or hash_file(path)
model, processor = load_for_inference("hf://{REPO}@main")
assert (local_checkpoint("hf://{REPO}") / "manifest.json").is_file()
assert hashed.count("model.safetensors") == 1, hashed
print(type(model).__name__)
"""
    assert python(server, tmp_path, code) == "TinyGPTVForConditionalGeneration"
    weights = f"/{REPO}/resolve/{COMMIT}/model.safetensors"
    whole = server.files[weights]
    server.files[weights] = whole[:-4] + b"\1\2\3\4"  # of the same size
    code = f"""
from tinygptv.hub import main
print(main(["pull", "{REPO}", "--output", {str(tmp_path / "out")!r}]))
"""
    assert python(server, tmp_path / "changed", code) == "2"  # does not match its hash
    server.files[weights] = whole
    server.files[f"/{REPO}/resolve/{COMMIT}/generation_config.json"] = b'{"a": 1}'
    code = f"""
from tinygptv.hub import main
print(main(["pull", "{REPO}", "--output", {str(tmp_path / "out")!r}]))
"""
    assert python(server, tmp_path / "other", code) == "2"  # does not match its manifest


def job(server, tmp_path, name, *words):
    """Run a job; returns its exit status and what it printed."""
    variables = {"HF_ENDPOINT": server.base, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | variables
    command = [sys.executable, str(ROOT / f"jobs/{name}.py"), "tracking_uri=none", *words]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_quantize_takes_repositories(server, tmp_path):
    """The checkpoint and the held-out rows are on the hub; a second run finds its artifact and asks for no weights."""
    shards = write_shard_set(tmp_path / "shards", make_rows("pairs", 4))
    publish_repository(server, shards, "org/data", "datasets", below="own")
    words = [f"checkpoint=hf://{REPO}", "data=hf://datasets/org/data", "drift_samples=2", "max_drift=100"]
    code, printed = job(server, tmp_path, "quantize", *words, "output=artifact")
    assert code == 0, printed
    metadata = json.loads((tmp_path / "artifact/quantization.json").read_text())
    assert metadata["drift"]["data"] == "hf://datasets/org/data"
    assert json.loads((tmp_path / "artifact/result.json").read_text())["checkpoint"] == f"hf://{REPO}"
    server.requests.clear()
    code, printed = job(server, tmp_path, "quantize", *words, "output=artifact")
    assert code == 0 and "finished already" in printed, printed
    assert not [path for _, path, _ in server.requests if path.endswith(".safetensors")]


def test_a_stage_starts_from_a_repository_that_a_file_names(server, tmp_path):
    """Words of the command line and of the configuration alike switch the hub on."""
    for stage in RECIPES["mini"]:
        for source in stage.sources if stage.number == 3 else ():
            write_shard_set(tmp_path / "data" / source.name, make_rows("pairs", 4))
    (tmp_path / "own.yaml").write_text(f"train:\n  init_from: hf://{REPO}\n")
    code, printed = job(server, tmp_path, "stage3", "--config", "own.yaml", "data=data", "dry_run=true")
    assert code == 0 and "3 (human-like learning)" in printed and "HTTP Request" not in printed, printed
    code, printed = job(server, tmp_path, "stage3", "init_from=hf://org/nothing", "data=data", "dry_run=true")
    assert code == 2 and "error: hf://org/nothing cannot be downloaded" in printed
