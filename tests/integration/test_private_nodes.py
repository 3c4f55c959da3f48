"""One stage on two Ray nodes that share nothing but a bucket; test_bucket_cluster.py is the whole way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.miniature.tiny_training import command_changes, command_line, make_world, train_settings
from pipelines.training.run import run_stage
from tests.private_nodes import bucket_environment, bucket_server, private_cluster, why_not
from tinygptv.checkpoint.folders import MANIFEST

pytest.importorskip("moto", reason="the S3 server of these tests is in the dev extra")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800), pytest.mark.skipif(bool(why_not()), reason=why_not())]

BUCKET = "s3://private"


def test_a_stage_on_two_nodes_from_the_bucket_to_the_bucket(tmp_path, monkeypatch):
    world = make_world(tmp_path / "world")
    with bucket_server("private") as endpoint:
        for name, value in bucket_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        storage.upload_folder(Path(world["data"], "pairs"), f"{BUCKET}/data/pairs", MANIFEST)
        storage.upload_folder(Path(world["init_from"]), f"{BUCKET}/start", MANIFEST)
        remote = {"data": f"{BUCKET}/data", "init_from": f"{BUCKET}/start"}
        # two CPUs each: a worker and its loader fill a node
        sizes = {"num_workers": 2, "cpus_per_worker": 2, "loader_workers": 1}
        with private_cluster(tmp_path / "nodes", endpoint, num_workers=2) as cluster:
            refused, output = cluster.submit("jobs/stage4.py", *command_line(remote, "/tmp/out", **sizes)), "/tmp/out"
            told, _ = refused.communicate(timeout=900)
            assert refused.returncode != 0
            assert f"error: output={output} is a path of this machine that the node at 127.0.1." in told
            words = command_line(remote, f"{BUCKET}/out", **sizes)
            printed = cluster.run("jobs/stage4.py", *words, timeout=900)
            fetched = [list((node.folder / "tmp").glob("tinygptv-cache-*/checkpoints/*")) for node in cluster.nodes[1:]]
        assert f"{BUCKET}/out/result.json" in printed.splitlines()[-20:]
        assert all(fetched), "each node has a copy of the start of its own"
        names = storage.list_names(f"{BUCKET}/out")
        assert {"metrics.jsonl", "config.yaml", "loss.png", "result.json"} <= set(names)
        run_stage(train_settings(world, tmp_path / "one", num_workers=0, **command_changes()), 4)
        losses = [
            [json.loads(line)["loss"] for line in storage.read_bytes(f"{place}/metrics.jsonl").splitlines()]
            for place in (f"{BUCKET}/out", str(tmp_path / "one"))
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6
