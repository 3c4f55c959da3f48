"""Headers that command Ray Serve's proxy are taken out of requests: whoever sends a request is not who runs the server.

With them, a client could have its request computed to the end after it left (``X-Request-Disconnect-Disabled``), or be
answered in plain text by the proxy (``X-Request-Timeout-Seconds``, or any of them outside of ASCII).
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

COMMANDS = frozenset(
    {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id", b"serve-multiplexed-model-id"}
)
"""Names of these headers (``ray/serve/_private/constants.py``, Ray 2.60), with hyphens for underscores as Serve reads
them."""


class ClientHeaders:
    """Gives Serve's proxy the headers that are the model's matter, and a request id if it is one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if "headers" in scope:
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _passes(name, value)]}
        await self.app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    name = name.lower().replace(b"_", b"-")
    return name not in COMMANDS and (name != b"x-request-id" or value.isascii())  # without one, Serve makes one
