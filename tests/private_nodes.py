"""Ray nodes on this machine that share no disk, and a bucket whose server has faults on demand; for tests.

Each node is a process tree in mount and process namespaces of its own: its ``/tmp``, home folder and ``/dev/shm`` are
private, and the repository is hidden from it, so that it has of the code only what Ray ships with a job. Nodes find
each other at loopback addresses (127.0.1.x). ``Node.kill`` ends all processes of a node at once, as losing a machine
does. Needs the right to make mount namespaces (root): ``why_not`` says whether.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.paths import ROOT

_READY_WITHIN_S = 600
_TRIES = 5


def why_not() -> str:
    """Why nodes that share no disk cannot be made here; empty where they can."""
    if shutil.which("unshare") is None:
        return "unshare (util-linux) is missing"
    probe = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"mount namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Found = TypeVar("Found")


def wait_for(condition: Callable[[], Found], within_s: float, what: str) -> Found:
    """Wait until something is found; ``what`` is said where it is not in time."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(1)
    return found


# ---------------------------------------------------------------------- nodes


def enter(folder: Path, command: list[str], before: tuple[str, ...] = ()) -> list[str]:
    """The command in namespaces of its own, with private folders below ``folder``; ``before`` are shell lines."""
    prefix = Path(sys.prefix)
    inside = prefix.is_relative_to(ROOT)
    lines = [
        "set -e",
        "mount --make-rprivate /",
        "mount -t tmpfs -o size=512m,mode=1777 tmpfs /dev/shm",
        f"mkdir -p {folder}/tmp {folder}/venv",
        *([f"mount --bind {prefix} {folder}/venv"] if inside else []),
        f"mount -t tmpfs tmpfs {ROOT}",
        *([f"mkdir -p {prefix}", f"mount --bind {folder}/venv {prefix}"] if inside else []),
        f"mount --bind {folder}/tmp /tmp",  # last: the folder itself may be below /tmp
        "mkdir -p /tmp/home && cd /tmp/home",
        *before,
        'exec "$@"',
    ]
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*unshare, "bash", "-c", "\n".join(lines), "node", *command]


@dataclass
class Node:
    """One Ray node; ``folder/tmp`` is its ``/tmp``."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End every process of the node at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "node.log").read_text(errors="replace")


@dataclass
class PrivateCluster:
    """A head and workers.

    Attributes:
        folder: of all nodes.
        environment: of nodes and of those who submit jobs.
        nodes: that were started.
    """

    folder: Path
    environment: dict[str, str]
    nodes: list[Node] = field(default_factory=list)
    gcs_port: int = 0
    dashboard_port: int = 0

    @property
    def dashboard(self) -> str:
        return f"http://127.0.1.1:{self.dashboard_port}"

    def start(self, num_workers: int, cpus: int = 3) -> None:
        """Start the head, which runs no tasks, and workers."""
        self._start_node("head", self._head)
        deadline = time.monotonic() + _READY_WITHIN_S
        while not self._answers():
            assert time.monotonic() < deadline, self.nodes[0].log
            time.sleep(1)
        for _ in range(num_workers):
            self.add_worker(cpus)

    def add_worker(self, cpus: int = 3) -> Node:
        """One more node."""
        address = [f"--address=127.0.1.1:{self.gcs_port}", f"--num-cpus={cpus}"]
        return self._start_node(f"worker{len(self.nodes)}", lambda: address)

    def _head(self) -> list[str]:
        """Arguments of a head at ports that are free now."""
        self.gcs_port, self.dashboard_port = free_port(), free_port()
        dashboard = [
            "--include-dashboard=true",
            "--dashboard-host=127.0.1.1",
            f"--dashboard-port={self.dashboard_port}",
        ]
        return ["--head", f"--port={self.gcs_port}", "--num-cpus=0", *dashboard]

    def _answers(self) -> bool:
        try:
            request = urllib.request.Request(f"{self.dashboard}/api/version", headers=self._authorization())
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}

    def _start_node(self, name: str, arguments: Callable[[], list[str]]) -> Node:
        """Start a node and wait for it. On a busy machine Ray gives up its start after seconds: it is tried again."""
        for attempt in range(_TRIES):
            node = self._launch(f"{name}-{attempt}", arguments())
            while node.process.poll() is None and "Ray runtime started" not in node.log:
                time.sleep(1)
            if node.process.poll() is None:
                self.nodes.append(node)
                return node
            node.kill()
        raise AssertionError(node.log)

    def _launch(self, name: str, arguments: list[str]) -> Node:
        folder = self.folder / name
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        store = "--object-store-memory=150000000"
        ip = f"--node-ip-address=127.0.1.{len(self.nodes) + 1}"
        # Ports that Ray is told need not be waited for: its raylet gives its agents only seconds to say theirs.
        agents = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
        ports = [f"--{name}-port={free_port()}" for name in agents]
        environment = {**self.environment, "HOME": "/tmp/home", "TMPDIR": "/tmp"}
        with (folder / "node.log").open("wb") as log:
            process = subprocess.Popen(
                enter(folder, [*start, store, ip, *ports, *arguments]),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return Node(name, folder, process)

    def submit(self, *words: str) -> subprocess.Popen[str]:
        """``ray job submit`` of a job's command, from the repository, as a user does."""
        home = self.folder / "user"
        home.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.dashboard]
        return subprocess.Popen(
            [*command, "--working-dir", str(ROOT), "--", "python", *words],
            env={**self.environment, "HOME": str(home)},
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, timeout: float = 900) -> str:
        """Submit a job and wait for it; returns what it printed."""
        job = self.submit(*words)
        output, _ = job.communicate(timeout=timeout)
        assert job.returncode == 0, output
        return output

    def stop(self) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                node.kill()


@contextlib.contextmanager
def private_cluster(folder: Path, endpoint: str, num_workers: int) -> Iterator[PrivateCluster]:
    """A cluster whose nodes have the credentials of a bucket in their environment, and stop with the block."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "PYTHON"))}
    environment = {
        **kept,
        **bucket_environment(endpoint),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    cluster = PrivateCluster(folder, environment)
    try:
        cluster.start(num_workers)
        yield cluster
    finally:
        cluster.stop()


# ---------------------------------------------------------------------- the bucket

SECRET = secrets.token_hex(20)
"""No log may show it: made at run time, for a node also has this file."""


def bucket_environment(endpoint: str) -> dict[str, str]:
    """Credentials and address of the bucket, as nodes of a cloud have them."""
    return {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextlib.contextmanager
def bucket_server(bucket: str) -> Iterator[str]:
    """An S3 server on loopback with one bucket; its address.

    Connections of a process are kept by the bucket's name: each test module has a name of its own.
    """
    for _ in range(_TRIES):  # another process may take a free port first
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        endpoint = f"http://127.0.0.1:{port}"
        try:
            if _makes_bucket(process, f"{endpoint}/{bucket}"):
                yield endpoint
                return
        finally:
            process.kill()
            process.wait()
    raise AssertionError("moto does not start")


def _makes_bucket(process: subprocess.Popen[bytes], location: str) -> bool:
    """Make a bucket as soon as the server answers; False where its process has ended."""
    while process.poll() is None:
        try:
            urllib.request.urlopen(urllib.request.Request(location, method="PUT"), timeout=60).close()
        except OSError:
            time.sleep(0.5)
        else:
            return process.poll() is None
    return False


Fault = Callable[[str, str, int], str]
"""Method, path and number of a request -> ``""``, ``503``, ``slow``, ``cut`` (an upload) or ``stale`` (a listing)."""


@dataclass
class FaultyBucket:
    """A proxy before an S3 server that injects faults.

    Attributes:
        endpoint: its address.
        fault: decides what happens to a request; may be set at any time.
        injected: faults so far.
    """

    endpoint: str
    fault: Fault = field(default=lambda method, path, number: "")
    injected: list[tuple[str, str, str]] = field(default_factory=list)


@contextlib.contextmanager
def faulty_bucket(server: str) -> Iterator[FaultyBucket]:
    """Put a proxy before a server."""
    host = server.removeprefix("http://")
    listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}
    count = iter(range(10**9))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            kind = bucket.fault(self.command, self.path, next(count))
            body = self._read_body(half=kind == "cut")
            if kind:
                bucket.injected.append((kind, self.command, self.path))
            if kind == "cut":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if kind == "503":
                self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>Please reduce your rate</Message></Error>")
                return
            if kind == "stale" and self.path in listings:
                self._answer(*listings[self.path])
                return
            dropped = ("connection", "expect", "transfer-encoding", "content-length")
            connection = http.client.HTTPConnection(host, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            answer = (response.status, response.getheaders(), content)
            if self.command == "GET" and "list-type" in self.path:
                listings.setdefault(self.path, answer)
            self._answer(*answer, slow=kind == "slow")
            connection.close()

        def _read_body(self, half: bool) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                length = int(self.headers.get("Content-Length") or 0)
                return self.rfile.read(length // 2 if half else length)
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    return body
            while self.rfile.readline().strip():
                pass  # trailers
            return body

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, slow: bool = False) -> None:
            self.send_response(status)
            dropped = ("transfer-encoding", "connection", "content-length", "date", "server")
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length" and self.command == "HEAD":
                    length = value
                elif name.lower() not in dropped:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            for start in range(0, len(content), max(1, len(content) // 4)):
                self.wfile.write(content[start : start + max(1, len(content) // 4)])
                if slow:
                    time.sleep(0.3)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that left, or that was cut off."""

    with Server(("127.0.0.1", 0), Handler) as proxy:
        bucket = FaultyBucket(f"http://127.0.0.1:{proxy.server_address[1]}")
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield bucket
        proxy.shutdown()
