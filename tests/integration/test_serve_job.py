"""``jobs/serve_http.py`` as its user sees it: what it prints, a proxy that dies, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest

from tests.paths import ROOT
from tests.serving_model import save_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

BODY = {"model": "tinygpt-v", "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}


class Job:
    """The job in a process of its own, with all that it prints."""

    def __init__(self, *settings):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "jobs/serve_http.py", *settings],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, text, seconds=600):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            found = [line for line in self.lines if text in line]
            if found:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"{text!r} was not printed:\n{self.output}")

    def stop(self):
        """Ctrl-C; the exit status."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(300)
        self.reader.join(60)
        return status


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    artifact = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    job = Job(f"artifact={artifact}", "port=0", "cpus_per_replica=0.1", "num_cpus=2", "object_store_mb=100")
    yield job
    if job.process.poll() is None:
        job.stop()


@pytest.fixture(scope="module")
def address(job):
    return job.wait_for("is ready").split("is ready: ")[1].split()[0]


def status_of(address):
    try:
        return httpx.post(f"{address}/v1/chat/completions", json=BODY, timeout=120, trust_env=False).status_code
    except httpx.HTTPError as error:
        return type(error).__name__


def test_the_first_line_comes_before_ray_starts(job, address):
    assert job.lines[0].startswith("Starting Ray and 1 replica of the model") and "is ready" in job.lines[-1]
    assert status_of(address) == 200


def test_a_killed_proxy_is_replaced_soon(job, address):
    """Ray's own default notices after some 30 s; clusters that the job starts are asked each second."""
    children = psutil.Process(job.process.pid).children(recursive=True)
    (proxy,) = [child for child in children if "ProxyActor" in "".join(child.cmdline())]
    (controller,) = [child for child in children if "ServeController" in "".join(child.cmdline())]
    assert controller.environ()["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "1"
    os.kill(proxy.pid, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while status_of(address) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert httpx.get(f"{address}/healthz", timeout=120, trust_env=False).status_code == 200


def test_a_stream_whose_ingress_is_killed_ends_with_an_error_event(job, address):
    children = psutil.Process(job.process.pid).children(recursive=True)
    (ingress,) = [child for child in children if ":ingress" in "".join(child.cmdline())]
    body = {**BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False) as answer:
        events = (event.removeprefix("data: ") for event in answer.iter_lines() if event)
        next(events)
        os.kill(ingress.pid, signal.SIGKILL)
        assert json.loads(list(events)[-1])["error"]["code"] == "unavailable"
    assert status_of(address) == 200


LEAVE = {
    "at once": lambda connection: None,
    "a little later": lambda connection: time.sleep(0.03),
    "after the first byte": lambda connection: connection.recv(1),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leave", LEAVE)
def test_leaving_clients_are_no_errors_of_the_server(address, leave, stream):
    """They close the connection whether or not the answer is ready: how fast the model is decides nothing."""
    url = httpx.URL(address)
    data = json.dumps({**BODY, "max_tokens": 400, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {url.host}\r\ncontent-type: application/json\r\n"
    with socket.create_connection((url.host, url.port), timeout=120) as connection:
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        LEAVE[leave](connection)
    assert status_of(address) == 200
    page = httpx.get(f"{address}/metrics", timeout=120, trust_env=False).text
    assert 'status="500"' not in page and 'tinygptv_requests_total{status="200"}' in page


def test_ctrl_c_ends_it_in_peace(job, address):
    """The last of this file: answers are finished; no traceback, and not Ray's line about ``graceful_shutdown``."""
    body = {**BODY, "max_tokens": 400, "ignore_eos": True, "stream": True}
    url = f"{address}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as answer:
        events = answer.iter_lines()
        assert next(events).startswith("data: ")
        job.process.send_signal(signal.SIGTERM)
        assert [event for event in events if event][-1] == "data: [DONE]"
    assert job.process.wait(300) == 0
    job.reader.join(60)
    own = [line for line in job.lines if "(raylet)" not in line]  # on a busy machine Ray tells how its workers ended
    assert own[-1].startswith("Stopping when the answers in flight are finished")
    for noise in ("graceful_shutdown", "Traceback", "Exception"):
        assert noise not in job.output
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{address}/healthz", timeout=5, trust_env=False)
