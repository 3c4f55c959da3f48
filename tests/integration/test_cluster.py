"""A cluster that is started here: what its ports answer, to whom, and what others can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil
import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.integration

STARTS = """
import json, logging, os, sys
logging.basicConfig(level=logging.WARNING)
import ray  # before the environment is prepared, as the server does
from pipelines.cluster import start_ray
from pipelines.settings import Settings
with start_ray(Settings(num_cpus=1, object_store_mb=80, quiet=True)):
    value = ray.get(ray.remote(lambda: 42).remote())
    address = ray.get_runtime_context().gcs_address
    print(json.dumps({"value": value, "address": address, "mode": os.environ.get("RAY_AUTH_MODE")}), flush=True)
    sys.stdin.readline()
"""

JOINS = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
from pipelines.cluster import start_ray
from pipelines.settings import Settings, SettingsError
import ray
try:
    with start_ray(Settings(ray_address=sys.argv[1], quiet=True)):
        print("joined", ray.get(ray.remote(lambda: 42).remote()))
except SettingsError as error:
    print("refused", error)
"""


def environment(home, **more):
    dropped = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    home.mkdir(exist_ok=True)
    return {**kept, "HOME": str(home), "PYTHONPATH": str(ROOT), **more}


def start(env):
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS], env=env, cwd=ROOT, stdin=-1, stdout=-1, stderr=subprocess.PIPE, text=True
    )
    line = process.stdout.readline()
    assert line.startswith("{"), process.stderr.read()
    return process, json.loads(line)


def stop(process):
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=300) == 0
    return process.stderr.read()


def join(address, env):
    done = subprocess.run(
        [sys.executable, "-c", JOINS, address],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_started_cluster_listens_on_loopback_and_asks_for_a_token(tmp_path):
    home = environment(tmp_path / "home")
    process, told = start(home)
    try:
        assert told["value"] == 42 and told["mode"] == "token"
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = {c.laddr.ip for p in everyone for c in p.net_connections("inet") if c.status == "LISTEN"}
        assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        token = (tmp_path / "home/.ray/auth_token").read_text()
        assert not [p.pid for p in everyone if token in " ".join(p.cmdline())], "a token in a command line"
        assert "joined 42" in join(told["address"], home), "the same user needs to copy nothing"
        assert "refused" in join(told["address"], environment(tmp_path / "stranger"))
        assert "refused" in join(told["address"], environment(tmp_path / "guesser", RAY_AUTH_TOKEN="0" * 64))
        assert "refused" in join(told["address"], environment(tmp_path / "disabled", RAY_AUTH_MODE="disabled"))
    finally:
        assert "asks for no token" not in stop(process)


def test_a_cluster_without_tokens_is_an_explicit_choice_that_is_warned_of(tmp_path):
    env = environment(tmp_path / "home", RAY_AUTH_MODE="disabled")
    process, told = start(env)
    try:
        joined = join(told["address"], env)
        assert "joined 42" in joined and "asks for no token" in joined
    finally:
        assert "this Ray cluster (RAY_AUTH_MODE=disabled) asks for no token" in stop(process)
