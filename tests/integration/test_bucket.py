"""A real S3 server on loopback with faults: what passes is retried and told, what does not is one sentence."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.json_files import read_json_object
from pipelines.miniature.tiny_training import as_words, make_world, train_settings
from pipelines.storage import retry
from tests.paths import ROOT
from tests.private_nodes import SECRET, bucket_environment, bucket_server, faulty_bucket
from tinygptv.checkpoint.folders import MANIFEST

pytest.importorskip("moto", reason="the S3 server of these tests is in the dev extra")


@pytest.fixture(scope="module")
def proxy():
    with bucket_server("bucket") as server, faulty_bucket(server) as faulty:
        yield faulty


@pytest.fixture(autouse=True)
def environment(proxy, monkeypatch, tmp_path):
    for name, value in bucket_environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TINYGPTV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    proxy.fault = lambda method, path, number: ""
    proxy.injected.clear()
    yield
    proxy.fault = lambda method, path, number: ""


def test_a_folder_comes_back_as_it_went(tmp_path):
    source = tmp_path / "a"
    (source / "deep").mkdir(parents=True)
    (source / "deep/x.bin").write_bytes(bytes(range(256)) * 100)
    (source / MANIFEST).write_text("{}")
    storage.upload_folder(source, "s3://bucket/folder", MANIFEST)
    assert [file.name for file in storage.find_below("s3://bucket/folder")] == ["deep/x.bin", "manifest.json"]
    copy = storage.download_files("s3://bucket/folder", ["deep/x.bin"], tmp_path / "b")
    assert (copy / "deep/x.bin").read_bytes() == (source / "deep/x.bin").read_bytes()
    storage.remove_folder("s3://bucket/folder")
    assert storage.list_names("s3://bucket/folder") == {}


@pytest.mark.parametrize("kind", ["503", "cut", "slow"])
def test_faults_that_pass_are_retried_and_lose_nothing(proxy, kind, caplog):
    content = bytes(range(256)) * 4000
    proxy.fault = lambda method, path, number: kind if number % 3 == 0 else ""
    with caplog.at_level(logging.WARNING):
        for number in range(4):
            storage.write_atomically(f"s3://bucket/{kind}/{number}", content)
            assert storage.read_bytes(f"s3://bucket/{kind}/{number}") == content
            assert storage.num_bytes(f"s3://bucket/{kind}/{number}") == len(content)
    assert proxy.injected and {each[0] for each in proxy.injected} == {kind}
    assert SECRET not in caplog.text


def test_a_storage_that_stays_away_is_told_with_every_try(proxy, caplog, monkeypatch):
    monkeypatch.setattr(retry, "TRIES", 2)
    proxy.fault = lambda method, path, number: "503" if "away" in path else ""
    with caplog.at_level(logging.WARNING), pytest.raises(storage.StorageError) as error:
        storage.read_bytes("s3://bucket/away")
    assert "s3://bucket/away failed 2 times" in str(error.value) and "resumes" in str(error.value)
    assert "try 1 of 2" in caplog.text


def test_a_listing_that_lags_hides_nothing(proxy, tmp_path):
    """What a manifest names is asked for by name where a listing does not show it yet."""
    from pipelines.data.shards import ShardSet

    world = make_world(tmp_path / "world")
    assert storage.list_names("s3://bucket/lag/pairs") == {}  # remembered by the proxy
    storage.upload_folder(tmp_path / "world/shards/pairs", "s3://bucket/lag/pairs", MANIFEST)
    proxy.fault = lambda method, path, number: "stale" if "list-type" in path else ""
    assert storage.list_names("s3://bucket/lag/pairs") == {}
    assert len(ShardSet.open("s3://bucket/lag/pairs")) == len(ShardSet.open(f"{world['data']}/pairs"))


@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("s3://no-such-bucket/a", "the bucket of s3://no-such-bucket/a does not exist"),
        ("s3://bucket/a", ""),
    ],
)
def test_access_is_checked_before_work(location, sentence):
    if not sentence:
        storage.check_access(location, writes=True)
        assert storage.list_names(location) == {}, "the check leaves nothing"
        return
    with pytest.raises(storage.StorageError, match=sentence):
        storage.check_access(location)


def test_a_refusal_names_the_uri_and_the_fix():
    location = storage.Location.parse("s3://bucket/out?secret_key=hidden")
    denied = OSError("When initiating multiple part upload: AWS Error ACCESS_DENIED during CreateMultipartUpload")
    sentence = retry.refusal(location, denied)
    assert "s3://bucket/out" in sentence and "AWS_ACCESS_KEY_ID" in sentence and "hidden" not in sentence
    assert "does not exist" in retry.refusal(location, OSError("AWS Error NO_SUCH_BUCKET during PutObject"))
    assert retry.refusal(location, OSError("AWS Error SLOW_DOWN during PutObject")) == ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def in_bucket(world, place):
    for source in ("pairs", "questions"):
        storage.upload_folder(Path(world["data"], source), f"{place}/data/{source}", MANIFEST)
    storage.upload_folder(Path(world["init_from"]), f"{place}/start", MANIFEST)
    return {"data": f"{place}/data", "init_from": f"{place}/start"}


def test_a_stage_from_bucket_to_bucket(proxy, world, tmp_path):
    """Now and then a request fails; the losses are those of a run on a disk, and everything lies under output=."""
    from pipelines.training.record import read_record
    from pipelines.training.run import run_stage

    run_stage(train_settings(world, tmp_path / "local", quiet=False), 4)
    remote = in_bucket(world, "s3://bucket/stage")
    proxy.fault = lambda method, path, number: "503" if number % 17 == 0 else ""
    result = run_stage(train_settings(remote, "s3://bucket/stage/out", quiet=False), 4)
    proxy.fault = lambda method, path, number: ""
    assert result["result"] == "s3://bucket/stage/out/result.json"
    assert result["checkpoint"] == "s3://bucket/stage/out/checkpoint"
    assert read_json_object(result["result"])["steps"] == 12
    losses = [
        [entry["loss_hex"] for entry in read_record(place)]
        for place in ("s3://bucket/stage/out/metrics.jsonl", tmp_path / "local/metrics.jsonl")
    ]
    assert losses[0] == losses[1]
    names = storage.list_names("s3://bucket/stage/out")
    assert {"metrics.jsonl", "config.yaml", "loss.png", "fingerprint.json", "result.json"} <= set(names)
    assert proxy.injected
    assert run_stage(train_settings(remote, "s3://bucket/stage/out", quiet=False), 4) == result, "finished already"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"init_from": "s3://no-such-bucket/start"}, "the bucket of s3://no-such-bucket/start does not exist"),
        ({"init_from": "s3://bucket/unfinished"}, "s3://bucket/unfinished has files but no manifest.json"),
        ({"output": "s3://no-such-bucket/out"}, "the bucket of s3://no-such-bucket/out does not exist"),
    ],
)
def test_bad_input_is_one_sentence_of_the_command(world, tmp_path, changes, sentence):
    storage.write_atomically("s3://bucket/unfinished/model.safetensors", b"half")
    output = changes.pop("output", tmp_path)
    words = as_words(train_settings({**world, **changes}, output))
    done = subprocess.run(
        [sys.executable, "jobs/stage4.py", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and sentence in errors[0], done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
def test_an_ablation_from_bucket_to_bucket(proxy, world, tmp_path):
    """Variants, their stages and scores, the table and the report: everything in the bucket."""
    from pipelines.ablation.run import ablate
    from pipelines.miniature.tiny_training import STAGE
    from pipelines.settings import AblateSettings
    from tinygptv.miniature.writers import write_world

    write_world(tmp_path / "drawn", 1, 4, sources=())
    storage.upload_folder(tmp_path / "drawn", "s3://bucket/drawn", "sources.json")
    fields = {
        **in_bucket(world, "s3://bucket/ablation"),
        "variants": ["full", "no_qk_norm"],
        "stages": [1, 2],
        "precisions": ["fp32"],
        "max_steps": 2,
        "benchmark_data": "s3://bucket/drawn",
        "score_limit": 2,
        "features": "inline",
        "num_workers": 0,
        "tracking_uri": "none",
        "quiet": True,
        "train": {"micro_batch_size": 4},
        "stage": STAGE,
    }
    proxy.fault = lambda method, path, number: "503" if number % 29 == 0 else ""
    result = ablate(AblateSettings(**fields, output="s3://bucket/ablation/out"))
    assert [row["variant"] for row in result["rows"]] == ["full", "no_qk_norm"]
    assert all(value.startswith("s3://bucket/ablation/out/") for value in (result["result"], result["report"]))
    assert read_json_object(result["result"])["rows"] == result["rows"]
    assert {"result.json", "report.md", "index.html"} & set(storage.list_names("s3://bucket/ablation/out"))


def test_an_artifact_from_bucket_to_bucket_answers_a_file_of_requests(proxy, world):
    """quantize and batch, with failures now and then; the answers are those of the file's copy on a disk."""
    import json

    from pipelines.export import export
    from pipelines.serving.batch import run_batch
    from pipelines.settings import BatchSettings, QuantizeSettings

    checkpoint = in_bucket(world, "s3://bucket/small")["init_from"]
    requests = [{"messages": [{"role": "user", "content": f"say {word}"}], "max_tokens": 3} for word in ("red", "big")]
    storage.write_atomically("s3://bucket/small/requests.jsonl", "\n".join(map(json.dumps, requests)).encode())
    proxy.fault = lambda method, path, number: "503" if number % 19 == 0 else ""
    quantized = export(
        QuantizeSettings(
            checkpoint=checkpoint,
            method="cpu",
            drift_samples=2,
            max_drift=100,
            tracking_uri="none",
            output="s3://bucket/small/artifact",
        )
    )
    assert quantized["result"] == "s3://bucket/small/artifact/result.json"
    answered = run_batch(
        BatchSettings(
            artifact="s3://bucket/small/artifact",
            input="s3://bucket/small/requests.jsonl",
            output="s3://bucket/small/answers",
        )
    )
    lines = [json.loads(line) for line in storage.read_bytes("s3://bucket/small/answers/answers.jsonl").splitlines()]
    assert len(lines) == 2 and all(line["response"]["status_code"] == 200 for line in lines)
    assert (answered.requests, answered.failed) == (2, 0)
    assert proxy.injected
