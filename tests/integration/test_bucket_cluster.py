"""The whole way on nodes that share nothing but a bucket, by ``ray job submit``, from the bucket to the bucket.

Each node has a file system of its own (``tests.private_nodes``); the bucket's server answers 503 now and then. A node
is lost in the middle of stage 1 and of serving. The losses are those of the same run on one machine, to the last bit.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.request

import pytest

from pipelines import storage
from pipelines.miniature.tiny_training import as_words
from pipelines.settings import TrainSettings
from tests.paths import ROOT
from tests.private_nodes import (
    SECRET,
    bucket_environment,
    bucket_server,
    faulty_bucket,
    free_port,
    private_cluster,
    wait_for,
    why_not,
)

pytest.importorskip("moto", reason="the S3 server of these tests is in the dev extra")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]

BUCKET = "s3://nodes"
STAGE = {
    "sources": {"laion": {"weight": 1, "batch_size": 4}},
    "schedule": {"steps_per_epoch": 8, "epochs": 1, "peak": 1e-3, "minimum": 1e-4, "warmup_start": 1e-4},
}
QUIET = ("tracking_uri=none",)


def train_words(data, init_from, output, **changes):
    """Two workers that take a whole node each, with a loader beside each."""
    settings = TrainSettings(
        **{
            "data": data,
            "init_from": init_from,
            "output": output,
            "tracking_uri": "none",
            "num_workers": 2,
            "cpus_per_worker": 2,
            "threads_per_worker": 1,
            "loader_workers": 1,
            "checkpoint_every": 2,
            "log_every": 1,
            "micro_batch_size": 4,
            "max_failures": 5,
            "features": "cached",
            "stage": STAGE,
            **changes,
        }
    )
    return as_words(settings)


def losses(location):
    lines = storage.read_bytes(location).decode().splitlines()
    return [json.loads(line)["loss_hex"] for line in lines]


def last_line(output):
    lines = [line for line in output.splitlines() if line.strip()]
    return [line for line in lines if line.startswith(("s3://", "/"))][-1]


@pytest.fixture(scope="module")
def proxy():
    with bucket_server("nodes") as server, faulty_bucket(server) as faulty:
        for name, value in bucket_environment(faulty.endpoint).items():
            os.environ[name] = value
        yield faulty


@pytest.fixture(scope="module")
def raw(proxy, tmp_path_factory):
    """The drawn world and the backbones, in the bucket."""
    from pipelines.json_files import read_json_object
    from tinygptv.checkpoint.folders import MANIFEST
    from tinygptv.miniature.backbones import write_checkpoint
    from tinygptv.miniature.writers import write_world

    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "world", 48, 4, sources=("laion",))
    storage.upload_folder(folder / "world", f"{BUCKET}/raw", "sources.json")
    storage.upload_folder(write_checkpoint(folder / "start"), f"{BUCKET}/start", MANIFEST)
    files = read_json_object(folder / "world/sources.json") or {}
    return {"folder": folder, "input": files["laion"]["input"]}


@pytest.fixture(scope="module")
def cluster(proxy, raw, tmp_path_factory):
    with private_cluster(tmp_path_factory.mktemp("nodes"), proxy.endpoint, num_workers=2) as nodes:
        yield nodes


def test_from_raw_files_to_answers(cluster, proxy, raw, tmp_path):
    proxy.fault = lambda method, path, number: "503" if number % 41 == 0 else "slow" if number % 67 == 0 else ""
    printed = []

    def run(*words):
        printed.append(cluster.run(*words))
        return printed[-1]

    # ------------------------------------------------------------------ data and features
    done = run(
        "jobs/prepare_data.py",
        "source=laion",
        f"input={BUCKET}/raw/{raw['input']}",
        f"output={BUCKET}/data/laion",
        *QUIET,
    )
    assert last_line(done) == f"{BUCKET}/data/laion/result.json"
    done = run(
        "jobs/cache_features.py",
        f"data={BUCKET}/data",
        f"checkpoint={BUCKET}/start",
        "num_workers=2",
        "image_size=64",
        f"output={BUCKET}/features",
        *QUIET,
    )
    assert last_line(done) == f"{BUCKET}/features/result.json"

    # ------------------------------------------------------------------ stage 1; a node is lost in its middle
    stage1 = f"{BUCKET}/stage1"
    job = cluster.submit("jobs/stage1.py", *train_words(f"{BUCKET}/data", f"{BUCKET}/start", stage1))
    wait_for(lambda: storage.list_folders(f"{stage1}/states"), 600, "no training state was saved")
    cluster.nodes[-1].kill()
    cluster.add_worker()
    output, _ = job.communicate(timeout=1500)
    printed.append(output)
    assert job.returncode == 0, output
    assert last_line(output) == f"{stage1}/result.json"
    names = set(storage.list_names(stage1))
    assert {"metrics.jsonl", "loss.png", "config.yaml", "result.json"} <= names

    # ------------------------------------------------------------------ stage 2, score, quantize
    words = train_words(f"{BUCKET}/data", f"{stage1}/checkpoint", f"{BUCKET}/stage2", max_steps=2)
    assert last_line(run("jobs/stage2.py", *words)) == f"{BUCKET}/stage2/result.json"
    done = run(
        "jobs/score.py",
        f"checkpoint={BUCKET}/stage2/checkpoint",
        "benchmark=miniature_vqa",
        f"data={BUCKET}/raw",
        "limit=4",
        "num_workers=2",
        f"output={BUCKET}/score",
        *QUIET,
    )
    assert last_line(done) == f"{BUCKET}/score/result.json"
    assert {"predictions.jsonl", "report.html"} <= set(storage.list_names(f"{BUCKET}/score"))
    done = run(
        "jobs/quantize.py",
        f"checkpoint={BUCKET}/stage2/checkpoint",
        "method=cpu",
        "drift_samples=4",
        "max_drift=50",
        f"output={BUCKET}/artifact",
        *QUIET,
    )
    assert last_line(done) == f"{BUCKET}/artifact/result.json"

    # ------------------------------------------------------------------ serve on both nodes; one is lost
    port = free_port()
    service = cluster.submit(
        "jobs/serve_http.py", f"artifact={BUCKET}/artifact", "num_replicas=2", f"port={port}", "cpus_per_replica=2"
    )
    address = f"http://127.0.0.1:{port}"
    wait_for(lambda: answers(address), 600, "the service does not answer")
    assert ask(address)
    assert all(
        list((node.folder / "tmp").glob("tinygptv-cache-*/checkpoints/*/manifest.json")) for node in alive(cluster)
    )
    cluster.nodes[-1].kill()
    wait_for(lambda: ask(address), 120, "no answer after a node was lost")
    service.kill()
    service.wait()

    # ------------------------------------------------------------------ what every node logged, and the faults
    logs = [path for node in cluster.nodes for path in (node.folder / "tmp/ray").rglob("*") if path.is_file()]
    assert not [path for path in logs if SECRET.encode() in path.read_bytes()], "credentials in a log"
    assert not [text for text in printed if SECRET in text]
    assert {kind for kind, _, _ in proxy.injected} == {"503", "slow"}
    cluster.stop()

    # ------------------------------------------------------------------ the same run on one machine
    words = train_words(f"{BUCKET}/data", f"{BUCKET}/start", str(tmp_path / "stage1"))
    command = [sys.executable, "jobs/stage1.py", *words, "num_cpus=6", "object_store_mb=150"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=900)
    assert losses(f"{stage1}/metrics.jsonl") == losses(str(tmp_path / "stage1/metrics.jsonl"))


def alive(cluster):
    return [node for node in cluster.nodes[1:] if node.process.poll() is None]


def answers(address):
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def ask(address):
    picture = base64.b64encode(next((ROOT / "docs/gallery").glob("*.jpg")).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "text", "text": "what is it?"},
    ]
    body = {"model": "tinygpt-v", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())["choices"][0]["message"] is not None
    except OSError:
        return False
