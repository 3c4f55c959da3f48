"""The bounds on headers, message by message: a protocol, a transport and a clock that only note."""

from __future__ import annotations

import asyncio
import resource

import pytest
import uvicorn
from uvicorn.server import ServerState

from pipelines.serving import connections
from pipelines.serving.client_headers import ClientHeaders
from pipelines.serving.connections import GuardedProtocol
from pipelines.serving.lost_answers import LostAnswers
from tests.serving_api import Client

pytestmark = pytest.mark.security


class Transport(asyncio.Transport):
    """A connection that notes how it ends."""

    def __init__(self):
        super().__init__()
        self.ends, self.sent = [], b""

    def abort(self):
        self.ends.append("abort")

    def close(self):
        self.ends.append("close")

    def is_closing(self):
        return bool(self.ends)

    def write(self, data):
        self.sent += data

    def get_extra_info(self, name, default=None):
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def pause_reading(self):
        pass

    resume_reading = set_write_buffer_limits = pause_reading


class Timers:
    """The event loop, whose timers are noted instead of set."""

    def __init__(self, loop):
        self.loop, self.set, self.running = loop, [], []

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def call_later(self, seconds, action, *arguments):
        handle = Handle(self, seconds, action)
        if action.__name__ == "abort":
            self.set.append(seconds)
            self.running.append(handle)
        return handle


class Handle:
    def __init__(self, timers, seconds, action):
        self.timers, self.seconds, self.action = timers, seconds, action

    def cancel(self):
        if self in self.timers.running:
            self.timers.running.remove(self)


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


def connected(state=None):
    """A protocol that has just been connected, its transport and its timers."""
    config = uvicorn.Config(Client().app, log_level="critical", lifespan="off")
    config.load()
    timers = Timers(asyncio.get_running_loop())
    protocol = GuardedProtocol(config, state or ServerState(), {}, _loop=timers)
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport, timers


def run(steps):
    async def inside():
        return await steps()

    return asyncio.run(inside())


def test_headers_have_their_time_from_the_connection_on_and_again_from_the_next_request_on():
    async def steps():
        protocol, transport, timers = connected()
        assert timers.set == [15.0] and len(timers.running) == 1
        protocol.data_received(GET)
        assert len(timers.running) == 1, "they are not complete"
        protocol.data_received(b"\r\n")
        assert timers.running == [], "now they are"
        while not protocol.cycle.response_complete:
            await asyncio.sleep(0)
        assert transport.sent.startswith(b"HTTP/1.1 200")
        protocol.data_received(GET[:5])
        assert timers.set == [15.0, 15.0] and len(timers.running) == 1
        timers.running[0].action()
        assert transport.ends == ["abort"]

    run(steps)


def test_a_client_that_leaves_leaves_no_timer():
    async def steps():
        protocol, _, timers = connected()
        protocol.connection_lost(None)
        assert timers.running == [] and protocol not in protocol.connections

    run(steps)


@pytest.mark.parametrize(("size", "ends"), [(65_536, []), (65_537, ["abort"])])
def test_headers_have_a_size(size, ends):
    async def steps():
        protocol, transport, timers = connected()
        head = GET + b"X-A: "
        protocol.data_received(head)
        for _ in range(4):
            protocol.data_received(b"v" * ((65_000 - len(head)) // 4))
        rest = size - len(head) - 4 * ((65_000 - len(head)) // 4)
        protocol.data_received(b"v" * rest)
        assert transport.ends == ends and len(timers.running) == (0 if ends else 1)

    run(steps)


def test_the_size_is_of_each_request():
    async def steps():
        protocol, transport, timers = connected()
        for _ in range(2):
            protocol.data_received(GET + b"X-A: ")
            for _ in range(3):
                protocol.data_received(b"v" * 15_000)
            protocol.data_received(b"\r\n\r\n")
            while not protocol.cycle.response_complete:
                await asyncio.sleep(0)
        assert not transport.ends and timers.running == []

    run(steps)


def test_a_body_is_no_header():
    async def steps():
        protocol, transport, timers = connected()
        protocol.data_received(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
        assert timers.running == []
        for _ in range(2):
            protocol.data_received(b"x" * 70_000)
        assert timers.set == [15.0] and not transport.ends
        protocol.connection_lost(None)
        await asyncio.sleep(0)

    run(steps)


def test_so_many_connections_are_open(monkeypatch):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 == connections.MAX_CONNECTIONS
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)

    async def steps():
        state = ServerState()
        found = [connected(state) for _ in range(3)]
        assert [transport.ends for _, transport, _ in found] == [[], [], ["abort"]]
        assert [len(timers.running) for _, _, timers in found] == [1, 1, 0]

    run(steps)


def test_rays_proxy_takes_the_guard_by_its_path(monkeypatch):
    kinds = uvicorn.config.HTTP_PROTOCOLS
    monkeypatch.setitem(kinds, "auto", kinds["auto"])
    assert [middleware.cls for middleware in connections.guard_connections()] == [LostAnswers, ClientHeaders]
    assert kinds["auto"] == "pipelines.serving.connections:GuardedProtocol"
