"""An answer whose ingress dies (killed, out of memory) ends as the API's own errors do: clients try again.

Ray Serve's proxy gives up such a request without a word: uvicorn then answers with a plain 500, and ends a stream in
its middle, which clients take for a broken network.
"""

from __future__ import annotations

import json

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.errors import model_unavailable


class LostAnswers:
    """Ends what Serve's proxy leaves open: 503 where nothing was sent, in a stream of events an error."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_begun = is_stream = is_whole = False
        num_events = 0

        async def watch(message: Message) -> None:
            nonlocal has_begun, is_stream, is_whole, num_events
            if message["type"] == "http.response.start":
                has_begun = True
                headers = Headers(raw=list(message.get("headers", ())))
                is_stream = headers.get("content-type", "").startswith("text/event-stream")
            else:
                is_whole = not message.get("more_body", False)
                num_events += message.get("body", b"").count(b"\n\n")
            await send(message)

        await self.app(scope, receive, watch)
        error = model_unavailable()
        if not has_begun:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
        elif is_stream and not is_whole:
            told = error.body()
            event = f"data: {json.dumps(told)}\n\n"
            if scope["path"].rstrip("/").endswith("/responses"):
                named = {**told["error"], **told, "type": "error", "sequence_number": num_events}
                event = f"event: error\ndata: {json.dumps(named)}\n\n"
            await send({"type": "http.response.body", "body": event.encode()})
