"""Request bodies: bytes from the network -> a typed request, each bound checked before the work that it bounds."""

from __future__ import annotations

import asyncio
import codecs
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pydantic_core
from fastapi import Request
from pydantic import ValidationError

from pipelines.serving.errors import ProtocolError, too_busy
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.responses import ResponsesRequest
from pipelines.settings import ServeSettings

logger = logging.getLogger(__name__)

Kind = type[ChatRequest] | type[ResponsesRequest]

MAX_VALUES = 200_000
"""JSON values of a request, counted by the characters that separate them; parsing so many takes some 20 ms."""

GRACE_S = 5.0
MIN_BYTES_PER_S = 8_000
"""A body slower than this, after the grace, holds a connection for nothing."""

READ_AT_ONCE = 32
"""Bodies of the largest size that may be in memory before admission."""

CLIENT_SHARE = 0.75
"""Share of that memory that one client may take."""

OFF_LOOP_BYTES = 100_000
"""Larger bodies are parsed in a thread."""

_LOGGED_NAMES = 100


class BodyReader:
    """Reads and parses request bodies within the settings' bounds."""

    def __init__(self, settings: ServeSettings) -> None:
        self.max_bytes = int(settings.max_body_mb * 1_000_000)
        self.max_messages = settings.max_messages
        self.timeout_s = settings.body_timeout_s
        self.max_held = READ_AT_ONCE * self.max_bytes
        self._held: Counter[str] = Counter()
        self._ignored_names: set[str] = set()

    async def read(self, request: Request, client: str) -> bytes:
        """The body.

        Args:
            request: its body is not read yet.
            client: who sends it.

        Raises:
            ProtocolError: 413, 408, 415 or 429: it is too large, comes too slowly, is compressed, or too much else is
                being read.
            starlette.requests.ClientDisconnect: the client left.
        """
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large()
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ProtocolError(
                415,
                f"the request's body is compressed ({encoding[:40]}): send plain JSON, without content-encoding.",
                code="unsupported_encoding",
                closes=True,
            )
        clock = asyncio.get_running_loop().time
        started = clock()
        body = bytearray()
        try:
            async with asyncio.timeout(min(self.timeout_s, GRACE_S)) as deadline:
                async for chunk in request.stream():
                    body += chunk
                    self._hold(client, len(chunk))
                    if len(body) > self.max_bytes:
                        raise self._too_large()
                    # At the least rate, what has come by now lasts until this moment.
                    deadline.reschedule(started + min(self.timeout_s, GRACE_S + len(body) / MIN_BYTES_PER_S))
        except TimeoutError:
            raise ProtocolError(
                408,
                f"the request's body came too slowly: send at least {MIN_BYTES_PER_S // 1000} kB per second, and all "
                f"of it within {self.timeout_s:g} s.",
                code="request_timeout",
                closes=True,
            ) from None
        finally:
            self._held[client] -= len(body)
            if self._held[client] <= 0:
                del self._held[client]
        return bytes(body)

    def _hold(self, client: str, size: int) -> None:
        """Count bytes that are in memory, and refuse more than there is room for."""
        self._held[client] += size
        total = self._held.total()
        if total > self.max_held or (self._held[client] > CLIENT_SHARE * self.max_held):
            raise too_busy("the server is reading too many large requests; try again soon.", 2)

    async def parse(self, body: bytes, kind: Kind = ChatRequest) -> ChatRequest | ResponsesRequest:
        """Validate a body.

        Args:
            body: JSON.
            kind: the type of request.

        Raises:
            ProtocolError: 400, naming the first field that is wrong.
        """
        if len(body) < OFF_LOOP_BYTES:
            return self._parse(body, kind)
        return await asyncio.to_thread(self._parse, body, kind)

    def _parse(self, body: bytes, kind: Kind) -> ChatRequest | ResponsesRequest:
        num_values = sum(body.count(mark) for mark in (b",", b"[", b"{"))
        if num_values > MAX_VALUES:
            raise ProtocolError(
                400,
                f"the request holds about {num_values} values; at most {MAX_VALUES} are read.",
                code="request_too_large",
            )
        try:
            # Windows' tools begin files of UTF-8 with its mark.
            data = pydantic_core.from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
        except ValueError as error:
            raise ProtocolError(400, f"the request is not valid JSON: {error}.", code="invalid_json") from None
        messages = data.get(kind.CONVERSATION) if isinstance(data, dict) else None
        if isinstance(messages, list) and len(messages) > self.max_messages:
            raise ProtocolError(
                400,
                f"the conversation has {len(messages)} messages; this server takes {self.max_messages}.",
                param=kind.CONVERSATION,
                code="too_many_messages",
            )
        try:
            request = kind.model_validate(data)
        except ValidationError as error:
            raise _first_error(error) from None
        self._log_ignored(request.ignored_fields)
        return request

    def _log_ignored(self, names: list[str]) -> None:
        """One line per request that brings a name not seen before; bounded, because clients choose the names."""
        new = [name for name in names if name not in self._ignored_names]
        if new and len(self._ignored_names) < _LOGGED_NAMES:
            self._ignored_names.update(new[:_LOGGED_NAMES])
            logger.info("ignored request fields: %s", ", ".join(repr(name[:40]) for name in new[:10]))

    def _too_large(self) -> ProtocolError:
        return ProtocolError(
            413,
            f"the request is larger than {self.max_bytes / 1e6:g} MB: send fewer or smaller images.",
            code="request_too_large",
            closes=True,
        )


def _first_error(error: ValidationError) -> ProtocolError:
    # Where several types were possible, the mistake that lies deepest is the one in the type that was meant.
    first = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    param = _field_at(first["loc"])
    if first["type"] == "unsupported":
        return ProtocolError(400, f"{first['msg']}.", param=first["ctx"]["field"], code="unsupported_parameter")
    # A validator of ours speaks for itself.
    message = first["msg"].removeprefix("Value error, ")
    return ProtocolError(400, f"{param or 'the request'}: {message}.", param=param, code="invalid_value")


def _field_at(location: Sequence[int | str]) -> str | None:
    """The field as the request has it: pydantic's location also names types, and after an index the entry's tag."""
    names: list[str] = []
    has_tags = True
    for before, part in pairwise(("", *location)):
        if str(part).startswith("list["):
            has_tags = "tagged-union" in str(part)
        elif part != "str" and not (has_tags and isinstance(before, int)):
            names.append(str(part))
    return ".".join(names) or None
