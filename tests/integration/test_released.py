"""`make released`, rehearsed: published names, layouts and addresses on loopback, small random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.hub_server import serve_files
from tests.paths import ROOT
from tests.published_release import publish_release
from tests.serving_model import data_url, make_image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve_files() as files:
        publish_release(files, tmp_path_factory.mktemp("published") / "files")
        yield files


def command(server, output, *more):
    return [
        sys.executable, "jobs/released.py", "device=cpu", "memory=64GB", f"output={output}", "drift_samples=2",
        f"fetch.hub={server.base}", f"fetch.mirror={server.base}",
        "fetch.accept_changed=true", "server.port=0", "server.num_cpus=2", "server.object_store_mb=100", *more,
    ]  # fmt: skip


def environment(tmp_path):
    return {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(server, tmp_path, *more):
    words = command(server, tmp_path / "released", *more)
    settings = {"cwd": ROOT, "env": environment(tmp_path), "timeout": 900}
    return subprocess.run(words, capture_output=True, text=True, check=False, **settings)


def test_from_nothing_to_an_answer(server, tmp_path):
    """Killed while it downloads, started again, asked over HTTP, stopped; then straight to the artifact."""
    stage_path = next(path for path in server.files if path.endswith("TinyGPT-V_for_Stage4.pth"))
    continued, killed = threading.Event(), threading.Event()
    server.fail(f"/cdn{stage_path}", cut_at=1000)
    server.fail(f"/cdn{stage_path}", held=(continued, killed))
    first = subprocess.Popen(command(server, tmp_path / "released"), cwd=ROOT, env=environment(tmp_path))
    assert continued.wait(400), "it did not come to the middle of this file"
    first.kill()
    first.wait()
    killed.set()

    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        command(server, tmp_path / "released"), cwd=ROOT, env=environment(tmp_path), stdout=log, stderr=log
    )
    try:
        address = wait_for_address(process, tmp_path / "log")
        assert ask(address)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    plan, download, ready = (text.index(mark) for mark in ("8.6 GB to download", "to download.", "is ready: http"))
    assert plan < download < ready and "Quantizing (cpu)" in text

    server.requests.clear()
    again = run(server, tmp_path, "serve=false")
    assert again.returncode == 0, again.stderr
    assert "The artifact is ready" in again.stdout and not server.requests
    result = json.loads((tmp_path / "released/result.json").read_text())
    assert again.stdout.strip().splitlines()[-1] == str(tmp_path / "released/result.json")
    assert result["plan"]["method"] == "cpu" and set(result["files"]) >= {"eva_vit_g.pth", "TinyGPT-V_for_Stage4.pth"}

    other = run(server, tmp_path, "serve=false", "method=int8")  # other weights of the same checkpoint
    assert other.returncode == 0 and "converted already" in other.stdout, other.stderr
    assert not [path for _, path, _ in server.requests if path.endswith((".pth", ".safetensors"))]


def test_too_little_memory_is_told_before_anything_is_downloaded(server, tmp_path):
    server.requests.clear()
    done = run(server, tmp_path, "memory=3GB")
    assert done.returncode == 2 and not server.requests
    assert done.stderr.startswith("error: the released model does not fit this machine: cpu on cpu needs 6.")


def wait_for_address(process, log):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        text = log.read_text()
        if "is ready: http" in text:
            return text.split("is ready: ")[1].split()[0]
        assert process.poll() is None, text
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def ask(address):
    content = [
        {"type": "image_url", "image_url": {"url": data_url(make_image())}},
        {"type": "text", "text": "what is it?"},
    ]
    body = {"model": "tinygpt-v", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["completion_tokens"] > 0
