"""Connections that keep the HTTP proxy waiting for headers; uvicorn on loopback, as Ray Serve's proxy runs it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from pipelines.serving import connections
from tests.serving_api import CHAT, Client

pytestmark = pytest.mark.security

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(connections, "HEADERS_WITHIN_S", 600)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    assert connections.guard_connections() == []
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


def test_a_refusal_of_an_unfinished_body_ends_the_connection(port):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n".encode()
    with connect(port, head) as client:
        assert client.recv(10_000).startswith(b"HTTP/1.1 413")
        assert is_closed(client)


def test_the_number_of_connections_is_bounded(port, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(3)]
        with connect(port) as another:  # accepted in their order
            assert is_closed(another)
        assert all(answers(client) for client in held)
