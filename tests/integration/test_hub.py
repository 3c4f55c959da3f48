"""Checkpoint folders on the hub: loaded by id and checked against their manifest, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.hub_server import COMMIT, serve_files
from tests.serving_model import make_model, make_processor
from tinygptv.checkpoint.checkpoint import save_checkpoint

pytestmark = pytest.mark.integration

REPO = "org/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("hub") / "checkpoint"
    return save_checkpoint(target, make_model(), make_processor(), {"stage": 4, "recipe": "test"})


@pytest.fixture
def server(folder):
    """The folder as a repository: metadata of the commit and its tree, and the files by name."""
    with serve_files() as files:
        names = sorted(path.name for path in folder.iterdir())
        siblings = [{"rfilename": name, "size": (folder / name).stat().st_size} for name in names]
        info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "private": False}
        for revision in ("main", COMMIT):
            files.files[f"/api/models/{REPO}/revision/{revision}"] = json.dumps(info).encode()
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "0" * 40} for s in siblings]
            files.files[f"/api/models/{REPO}/tree/{revision}"] = json.dumps(tree).encode()
            for name in names:
                files.files[f"/{REPO}/resolve/{revision}/{name}"] = (folder / name).read_bytes()
        files.files[f"/api/models/{REPO}"] = json.dumps(info).encode()
        yield files


def python(server, tmp_path, code):
    """Run code in a process of its own: the hub's address is read when its library is imported."""
    variables = {"HF_ENDPOINT": server.base, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
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
