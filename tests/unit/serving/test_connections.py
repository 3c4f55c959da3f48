"""Connections that keep the HTTP proxy waiting for headers; uvicorn on loopback, as Ray Serve's proxy runs it."""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipelines.serving import connections
from pipelines.serving.client_headers import ClientHeaders
from pipelines.serving.lost_answers import LostAnswers
from tests.serving_api import CHAT, Client

pytestmark = pytest.mark.security

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_WITHIN_S", 600)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    assert [middleware.cls for middleware in connections.guard_connections()] == [LostAnswers, ClientHeaders]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Client(body_timeout_s=600).app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(60)


@contextlib.contextmanager
def connect(port, first=b""):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(first)
        yield client


def is_closed(client):
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def answers(client):
    client.sendall(GET)
    return client.recv(10_000).startswith(b"HTTP/1.1 200")


def test_headers_that_do_not_come_close_the_connection(port, monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_WITHIN_S", 0.1)
    with connect(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ") as client:
        assert is_closed(client)


def test_endless_headers_are_cut_off(port):
    with connect(port, b"GET /healthz HTTP/1.1\r\n") as client, contextlib.suppress(OSError):
        for _ in range(2000):
            client.sendall(b"X-Name: " + b"v" * 200 + b"\r\n")
        assert is_closed(client)


def test_headers_are_counted_for_each_request(port, monkeypatch):
    monkeypatch.setattr(connections, "MAX_HEADER_BYTES", 1000)
    with connect(port) as client:
        for _ in range(3):
            client.sendall(GET[:-2] + b"X-Name: " + b"v" * 500)
            time.sleep(0.02)
            client.sendall(b"\r\n\r\n")
            assert client.recv(10_000).startswith(b"HTTP/1.1 200")


REST = b" " * 1_000_000
"""More than the system keeps for a server that does not read it."""


def post(size, *, path=CHAT, version="1.1", header="Accept: */*"):
    return f"POST {path} HTTP/{version}\r\nHost: x\r\n{header}\r\nContent-Length: {size}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("head", "status", "is_kept"),
    [
        (post(20_000_000), b"413", False),
        (post(8_000_000, header="Content-Encoding: gzip"), b"415", False),
        (post(8_000_000, path="/v1/nothing"), b"404", True),
        (post(8_000_000, path="/v1/nothing", version="1.0"), b"404", False),
        (post(8_000_000, path="/v1/nothing", header="Connection: close"), b"404", False),
    ],
)
def test_a_client_that_sends_its_whole_request_first_finds_its_refusal(port, head, status, is_kept):
    size = int(head.split()[-1])
    with connect(port, head) as client:
        select.select([client], [], [], 60)  # the answer has come
        for _ in range(size // len(REST)):
            client.sendall(REST)
        answer = client.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 " + status) and answer.endswith(b"}}")
        assert answers(client) if is_kept else is_closed(client)


@pytest.mark.parametrize("path", [CHAT, "/v1/nothing"])
def test_the_rest_of_a_refused_body_has_its_time(port, path, monkeypatch):
    monkeypatch.setattr(connections, "REST_WITHIN_S", 0.1)
    with connect(port, post(99_999_999_999, path=path)) as client:
        assert client.recv(10_000).startswith(b"HTTP/1.1 4")
        client.sendall(REST)
        assert is_closed(client)


def test_headers_behind_a_refused_body_have_their_own_time(port, monkeypatch):
    with connect(port, post(len(REST), path="/v1/nothing")) as client:
        assert client.recv(10_000).startswith(b"HTTP/1.1 404")
        monkeypatch.setattr(connections, "HEADERS_WITHIN_S", 0.1)
        client.sendall(REST + GET[:-2])
        assert is_closed(client)


def test_the_number_of_connections_is_bounded(port, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(3)]
        with connect(port) as another:  # accepted in their order
            assert is_closed(another)
        assert all(answers(client) for client in held)


# ------------------------------------------------------------------------------------------- the protocol by itself


class Timer:
    """What a loop does later, unless it is cancelled."""

    def __init__(self, seconds, act):
        self.seconds, self.act, self.is_running = seconds, act, True

    def cancel(self):
        self.is_running = False


@pytest.fixture
def protocol(monkeypatch):
    """A connection without a socket; ``following`` is the request that uvicorn makes of the next bytes."""
    for name in ("connection_made", "connection_lost", "on_message_complete"):
        monkeypatch.setattr(HttpToolsProtocol, name, lambda *_: None)
    monkeypatch.setattr(HttpToolsProtocol, "data_received", lambda self, _: setattr(self, "cycle", self.following))
    made = connections.GuardedProtocol.__new__(connections.GuardedProtocol)
    made.connections, made.cycle, made.following, made.timers, made.aborted = [], None, None, [], []
    made.loop = SimpleNamespace(call_later=lambda *given: made.timers.append(Timer(*given)) or made.timers[-1])
    made.transport = SimpleNamespace(abort=lambda: made.aborted.append("aborted"), waits=False)
    made.connection_made(made.transport)
    return made


def running(protocol):
    return [timer.is_running for timer in protocol.timers]


def test_a_client_has_15_seconds_for_its_headers_as_long_as_it_is_there(protocol):
    (timer,) = protocol.timers
    assert timer.seconds == 15.0 and timer.is_running and not protocol.aborted
    timer.act()
    assert protocol.aborted == ["aborted"]
    protocol.connection_lost(None)
    assert not timer.is_running


def test_the_time_runs_for_the_headers_of_each_request_and_not_for_its_body(protocol):
    protocol.data_received(b"GET")
    assert running(protocol) == [True], "one time for all headers of a request"
    request = protocol.following = SimpleNamespace(response_complete=False)
    protocol.data_received(b" / HTTP/1.1")
    assert running(protocol) == [False]
    protocol.data_received(bytes(70_000))  # of its body
    protocol.on_message_complete()
    assert running(protocol) == [False]
    request.response_complete = True
    protocol.data_received(b"GET")
    assert running(protocol) == [False, True], "the next request of the same connection"
    protocol.following = SimpleNamespace(response_complete=False)
    protocol.data_received(b" / HTTP/1.1")
    assert running(protocol) == [False, False] and not protocol.aborted


def test_headers_may_have_65536_bytes(protocol):
    for size in (1, 65_535):
        protocol.data_received(bytes(size))
    assert not protocol.aborted
    protocol.data_received(b"x")
    assert protocol.aborted == ["aborted"] and running(protocol) == [False]


def test_half_of_the_files_that_a_process_may_open_are_for_connections(protocol):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 == connections.MAX_CONNECTIONS
    for count, aborted in ((connections.MAX_CONNECTIONS, []), (connections.MAX_CONNECTIONS + 1, ["aborted"])):
        protocol.connections = range(count)
        protocol.connection_made(protocol.transport)
        assert protocol.aborted == aborted
    assert running(protocol) == [True] * 2, "one that is turned away is not waited for"
