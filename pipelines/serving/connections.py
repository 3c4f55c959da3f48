"""Bounds on connections: their number, how long headers may take, and their size; and how refused bodies end.

Ray Serve's proxy runs uvicorn, which waits for headers as long as a client likes and takes as many as it sends. Serve
calls ``guard_connections`` in each proxy process where this variable of the environment was set when Ray started (as
``pipelines.serving.run`` does for clusters that it starts):

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pipelines.serving.connections:guard_connections
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipelines.serving.client_headers import ClientHeaders
from pipelines.serving.lost_answers import LostAnswers

HEADERS_WITHIN_S = 15.0
"""Longest time from the first byte of a request, or from the connection, to the end of its headers."""

MAX_HEADER_BYTES = 65_536

REST_WITHIN_S = 60.0
"""Longest time for the rest of a body whose request has its answer, a refusal; it is read and dropped."""

MAX_CONNECTIONS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
"""Open connections of a proxy; files and Ray's own connections need descriptors too."""


def guard_connections() -> list[Middleware]:
    """Have uvicorn use ``GuardedProtocol`` in this process; returns what Serve's proxy puts before its own parts."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"
    return [Middleware(LostAnswers), Middleware(ClientHeaders)]


class PatientTransport:
    """A connection that is closed once the request's body has come.

    Were it closed before, the system would answer what still comes with a reset, and a client that sends a large image
    would see a broken connection in place of the refusal that says why.
    """

    def __init__(self, transport: asyncio.Transport, protocol: GuardedProtocol) -> None:
        self._transport, self._protocol = transport, protocol
        self.waits = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close now, or with the end of the body; a second call closes now."""
        if self.waits or not self._protocol.is_in_body or self._transport.is_closing():
            self._transport.close()
        else:
            self.waits = True
            self._protocol.flow.resume_reading()
            self._protocol.expect_rest()

    def is_closing(self) -> bool:
        """Whether no further request is answered."""
        return self.waits or self._transport.is_closing()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which closes connections that keep it waiting for headers."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _read: object = None
    """uvicorn's cycle of the last request whose body has come."""

    @property
    def is_in_body(self) -> bool:
        """Whether a request's headers have come, and its body has not."""
        return self.cycle is not self._read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(cast(asyncio.Transport, PatientTransport(transport, self)))
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has left."""
        self._stop_expecting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: of headers, or of a body."""
        cycle, was_in_body = self.cycle, self.is_in_body
        if self._timer is None and (cycle is None or cycle.response_complete):
            self.expect_rest() if was_in_body else self._expect_headers()
        super().data_received(data)
        if self.cycle is not cycle:  # uvicorn makes one when headers are complete
            self._stop_expecting()
        elif self._timer is not None and not was_in_body:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._stop_expecting()
                self.transport.abort()

    def on_message_complete(self) -> None:
        """A request's body has come."""
        super().on_message_complete()
        self._read = self.cycle
        if self.transport.waits:
            self.transport.close()
        elif self.cycle.response_complete:
            self._stop_expecting()
            self._expect_headers()

    def expect_rest(self) -> None:
        """Bound the time for the rest of a body whose request has its answer; uvicorn drops what comes."""
        self._stop_expecting()
        self._timer = self.loop.call_later(REST_WITHIN_S, self.transport.abort)

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(HEADERS_WITHIN_S, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
