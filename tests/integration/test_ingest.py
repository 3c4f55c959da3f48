"""Ingest and its readers on a real Ray cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.data.ingest.job import ingest
from pipelines.data.shards import ShardSet
from pipelines.settings import PrepareDataSettings
from tests.paths import REALDATA, ROOT
from tests.source_files import jpeg, sample, write_tar, write_web_tar
from tinygptv.data.sample import SampleRow

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


def settings(folder, output="out", **changes):
    known = {"source": "laion", "input": str(folder / "*.tar"), "output": str(folder / output), "quiet": True}
    return PrepareDataSettings(**{**known, "tracking_uri": "none", **changes})


def content(folder) -> dict[str, bytes]:
    names = [path.name for path in Path(folder).glob("*.arrow")]
    return {name: Path(folder, name).read_bytes() for name in [*sorted(names), "manifest.json", "quarantine.jsonl"]}


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Ten tars, some of them damaged, with duplicates across them."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(8):
        write_web_tar(folder / f"{number:05d}.tar", number * 30, 30, (200, 150))
    write_tar(
        folder / "00008.tar", [*sample("000000", jpeg(0, (200, 150)), "picture number 0"), *sample("x", b"", "bad")]
    )
    whole = write_web_tar(folder / "00009.tar", 400, 30, (200, 150)).read_bytes()
    (folder / "00009.tar").write_bytes(whole[: len(whole) // 2])
    return folder


def test_cluster_gives_the_same_bytes_whatever_the_parallelism(tars):
    result = ingest(settings(tars, "parallel"))
    assert result["rows_in"] == sum(result[key] for key in ("rows_out", "duplicates", "filtered", "quarantined"))
    assert result["duplicates"] == 1
    ingest(settings(tars, "serial", num_workers=0))
    assert content(tars / "parallel") == content(tars / "serial")


def test_a_killed_worker_process_does_not_show(tars):
    ingest(settings(tars, "calm"))
    stop = threading.Event()
    killed = []

    def kill_a_busy_worker():
        while not stop.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::Map" in " ".join(process.cmdline()):
                        process.send_signal(signal.SIGKILL)
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_a_busy_worker)
    killer.start()
    try:
        for attempt in range(20):  # until a worker was caught at work
            result = ingest(settings(tars, f"killed-{attempt}"))
            assert result["rows_out"] > 200
            assert content(tars / f"killed-{attempt}") == content(tars / "calm")
            if killed:
                break
    finally:
        stop.set()
        killer.join()
    assert killed


KILLED = """
import sys
from pipelines.data.ingest.job import ingest
from pipelines.settings import PrepareDataSettings
fields = {"source": "laion", "input": sys.argv[1], "output": sys.argv[2], "tracking_uri": "none", "num_workers": 0}
print("ready", flush=True)
ingest(PrepareDataSettings(**fields))
"""


def test_kill_9_at_any_time_without_a_cluster(tmp_path):
    for number in range(8):
        write_web_tar(tmp_path / f"{number:05d}.tar", number * 40, 40, (200, 150))
    ingest(settings(tmp_path, "whole", num_workers=0))
    for delay in (0.03, 0.12):
        output = tmp_path / f"killed-{delay}"
        command = [sys.executable, "-c", KILLED, str(tmp_path / "*.tar"), str(output)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        ingest(settings(tmp_path, output.name, num_workers=0))
        assert content(output) == content(tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_of_the_job_and_the_same_command_again(tars, tmp_path):
    import ray

    ingest(settings(tars, "calm"))
    output = tmp_path / "out"
    command = [sys.executable, "jobs/prepare_data.py", "source=laion", f"input={tars}/*.tar", f"output={output}"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    with subprocess.Popen([*command, "tracking_uri=none", "quiet=true"], cwd=ROOT, env=environment) as job:
        while job.poll() is None and not list(output.glob("_staging/*.json")):
            time.sleep(0.005)
        job.kill()
    assert job.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    result = ingest(settings(tars, str(output)))
    assert result["reused_units"] >= 1
    assert content(output) == content(tars / "calm")


def test_duplicates_across_many_units_are_copied_on_the_cluster(tmp_path):
    for number in range(8):
        # Each tar begins with the last picture of the one before.
        seeds = [max(0, number * 40 - 1), *range(number * 40 + bool(number), number * 40 + 40)]
        members = [m for key, n in enumerate(seeds) for m in sample(f"{key}", jpeg(n), f"t {n}")]
        write_tar(tmp_path / f"{number}.tar", members)
    result = ingest(settings(tmp_path, shard_rows=100))
    assert (result["rows_in"], result["duplicates"]) == (321, 8)
    shards = ShardSet.open(result["output"])
    shards.verify()
    assert len(shards.shard_rows) > 2
    assert len({row.turns for row in shards}) == 313


@pytest.mark.skipif(not REALDATA.is_dir(), reason="no real photographs here")
def test_real_photographs(tmp_path):
    result = ingest(settings(tmp_path, input=str(REALDATA / "shards/*.tar")))
    assert (result["rows_in"], result["rows_out"], result["quarantined"]) == (180, 180, 0)
    row = ShardSet.open(result["output"]).row(0)
    assert row.image.startswith(b"\xff\xd8")
    assert row.turns[0].answers[0] == row.turns[0].answers[0].lower()


def test_ray_data_reads_the_shards(tars):
    from pipelines.data.ray_datasource import read_shards

    result = ingest(settings(tars, "parallel"))
    rows = {row["id"]: row for row in read_shards(result["output"]).take_all()}
    assert len(rows) == result["rows_out"]
    some = ShardSet.open(result["output"]).row(100)
    assert SampleRow.from_dict(rows[some.id]) == some


def test_job_by_hand_on_its_own_cluster(tars, tmp_path):
    command = [sys.executable, "jobs/prepare_data.py", "source=laion", f"input={tars}/*.tar", f"output={tmp_path}/out"]
    environment = {**os.environ, "RAY_ADDRESS": "", "HOME": str(tmp_path)}
    job = subprocess.run(
        [*command, "num_cpus=2", "object_store_mb=100", "tracking_uri=none"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 0, job.stderr
    result = json.loads(Path(job.stdout.splitlines()[-1]).read_text())
    assert result["rows_out"] == len(ShardSet.open(result["output"]))


def test_job_tells_a_users_mistake_in_one_sentence(tmp_path):
    command = [
        sys.executable,
        "jobs/prepare_data.py",
        "source=laion",
        f"input={tmp_path}/*.tar",
        f"output={tmp_path}/out",
    ]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 2
    assert "matches no file" in job.stderr
    assert "Traceback" not in job.stderr
