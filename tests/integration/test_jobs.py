"""Entry scripts on a real cluster: `ray start --head` on loopback, `ray job submit`, and what a user then sees."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.cluster import AUTH_MODE, ENVIRONMENT, ensure_token
from pipelines.miniature.tiny_training import command_changes, command_line, make_world, train_settings
from pipelines.training.run import run_stage
from tests.paths import ROOT
from tests.private_nodes import free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head node of its own, apart from the session's cluster; yields the environment in which to talk to it."""
    home = tmp_path_factory.mktemp("home")
    ensure_token(home / ".ray/auth_token")  # ray start, ray job submit and the jobs find it here
    sockets = Path("/tmp") / f"ray-jobs-{os.getpid()}"  # socket paths must be short
    process = None
    try:
        for _ in range(3):  # another process may take a free port first, and a busy machine may be too slow for Ray
            environment, process = start_head(home, sockets)
            if wait_for_jobs(environment, process):
                break
        assert process.poll() is None, (home / "head.log").read_text()
        yield environment
    finally:
        stop_head(process)
        shutil.rmtree(sockets, ignore_errors=True)


def start_head(home, sockets):
    """``ray start --head`` at free ports: the environment in which to talk to it, and its process."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {
        **os.environ,
        **ENVIRONMENT,
        AUTH_MODE: "token",
        "HOME": str(home),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "OMP_NUM_THREADS": "1",
    }
    start = (
        f"ray start --head --node-ip-address 127.0.0.1 --port {port} --dashboard-host 127.0.0.1 "
        f"--dashboard-port {dashboard} --dashboard-agent-listen-port {agent} --ray-client-server-port {free_port()} "
        f"--num-cpus 4 --object-store-memory {200 * 2**20} --temp-dir {sockets} --disable-usage-stats --block"
    )
    with (home / "head.log").open("w") as log:
        return environment, subprocess.Popen(start.split(), env=environment, cwd=ROOT, stdout=log, stderr=log)


def stop_head(process):
    if process is None or process.poll() is not None:
        return
    head = psutil.Process(process.pid)
    parts = [*head.children(recursive=True), head]
    process.terminate()
    for left in psutil.wait_procs(parts, timeout=60)[1]:
        left.kill()
    process.wait()


def add_node(environment, log):
    """A second node that joins the head; returns its process."""
    address = environment["RAY_ADDRESS"]
    words = (
        f"ray start --address {address} --node-ip-address 127.0.0.1 --num-cpus 4 --object-store-memory {100 * 2**20}"
    )
    stream = log.open("a")
    return subprocess.Popen([*words.split(), "--block"], env=environment, cwd=ROOT, stdout=stream, stderr=stream)


def kill_node(process):
    """SIGKILL everything that a node runs."""
    for part in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        part.kill()
    process.wait()


def wait_for_jobs(environment, process):
    """Wait until the head takes jobs; False where it has ended."""
    deadline = time.monotonic() + 900
    while (
        asked := subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, check=False)
    ).returncode:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, asked.stderr.decode()
        time.sleep(1)
    return True


def submit(environment, *words):
    command = ["ray", "job", "submit", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def result_of(text):
    """What the job printed last before Ray's own closing lines: the path of its result."""
    path = next(line for line in reversed(text.splitlines()) if line.strip().endswith("result.json"))
    return json.loads(Path(path.strip()).read_text())


def test_portable_form_then_short_form(head, world, tmp_path):
    """`--working-dir .` brings the code along; the short form runs the file where the cluster has the code."""
    first = command_line(world, tmp_path / "1", num_workers=1)
    text = submit(head, "--working-dir", ".", "--", "python", "jobs/stage1.py", *first)
    one = result_of(text)
    assert "step 6/6" in text and "samples/s" in text, "the progress line shows in the job's log"
    assert one["steps"] == 6 and Path(one["checkpoint"], "model.safetensors").is_file()

    second = command_line({**world, "init_from": one["checkpoint"]}, tmp_path / "2", num_workers=2)
    two = result_of(submit(head, str(ROOT / "jobs/stage2.py"), *second))
    assert two["steps"] == 6 and json.loads((tmp_path / "2/checkpoint/stage.json").read_text())["stage"] == 2


def test_a_mistake_is_one_sentence_and_fails_the_job(head, world, tmp_path):
    words = command_line({**world, "data": "/nowhere"}, tmp_path, num_workers=1)
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/stage1.py", *words]
    done = subprocess.run(command, env=head, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: data=/nowhere does not exist: give the folder of prepared shard sets" in done.stdout + done.stderr


@pytest.mark.slow
def test_a_node_dies_in_the_middle(head, world, tmp_path):
    """Two nodes with a worker each; one is killed, another replaces it, the run resumes from its last state."""
    log = tmp_path / "nodes.log"
    node = add_node(head, log)
    changes = {"num_workers": 2, "cpus_per_worker": 3, "max_failures": 5, "checkpoint_every": 10}
    words = command_line(world, tmp_path / "run", epochs=30, **changes)
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/stage1.py", *words]
    job = subprocess.Popen(command, env=head, cwd=ROOT, stdout=log.open("a"), stderr=subprocess.STDOUT)
    wait_until(lambda: steps_done(tmp_path / "run/progress.txt") >= 20, job, log)
    kill_node(node)
    other = add_node(head, log)
    assert job.wait(timeout=300) == 0, log.read_text()[-3000:]
    kill_node(other)

    run_stage(train_settings(world, tmp_path / "calm", **command_changes(epochs=30)), 1)
    ours, calm = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "calm")
    )
    assert len(ours) == 180 and [e["sample_ids"] for e in ours] == [e["sample_ids"] for e in calm]
    assert ours[-1]["loss"] == pytest.approx(calm[-1]["loss"], rel=0.02)


def steps_done(progress):
    """Steps by the progress line; 0 where there is none, or half of one."""
    found = re.search(r"step (\d+)/", progress.read_text()) if progress.is_file() else None
    return int(found[1]) if found else 0


def wait_until(condition, job, log):
    deadline = time.monotonic() + 240
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
