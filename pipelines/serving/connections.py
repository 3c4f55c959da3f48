"""Bounds on connections whose request has not begun: their number, how long headers may take, and their size.

Ray Serve's proxy runs uvicorn, which waits for headers as long as a client likes and takes as many as it sends. Serve
calls ``guard_connections`` in each proxy process where this variable of the environment was set when Ray started (as
``pipelines.serving.run`` does for clusters that it starts):

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=pipelines.serving.connections:guard_connections
"""

from __future__ import annotations

import asyncio
import resource

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADERS_WITHIN_S = 15.0
"""Longest time from the first byte of a request, or from the connection, to the end of its headers."""

MAX_HEADER_BYTES = 65_536

MAX_CONNECTIONS = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
"""Open connections of a proxy; files and Ray's own connections need descriptors too."""


def guard_connections() -> list[Middleware]:
    """Have uvicorn use ``GuardedProtocol`` in this process; no middleware is needed."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"
    return []


class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[valid-type]
    """uvicorn's HTTP protocol, which closes connections that keep it waiting for headers."""

    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(transport)
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
        cycle = self.cycle
        if self._timer is None and (cycle is None or cycle.response_complete):
            self._expect_headers()
        super().data_received(data)
        if self.cycle is not cycle:  # uvicorn makes one when headers are complete
            self._stop_expecting()
        elif self._timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._stop_expecting()
                self.transport.abort()

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(HEADERS_WITHIN_S, self.transport.abort)

    def _stop_expecting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
