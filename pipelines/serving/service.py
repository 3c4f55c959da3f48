"""What the API does with a chat request: from the body to the model, and from the model to JSON or events.

request -> room? -> body within bounds -> types -> pictures -> model -> JSON, or events
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from pipelines.serving import protocol
from pipelines.serving.backend import Backend, ChatJob, ModelInfo
from pipelines.serving.gate import Gate
from pipelines.serving.media import MediaLoader
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ChatRequest, ProtocolError
from pipelines.serving.turns import read_turns
from pipelines.settings import ServeSettings

log = logging.getLogger(__name__)


class StaleInfo(ProtocolError):
    """Pictures were resized for a model that has been replaced; asked again, the request fits."""


@dataclass
class Answer:
    """One request under way."""

    request: ChatRequest
    id: str
    created: int
    started: float
    image_size: tuple[int, int] | None
    image_index: int
    text: str = ""
    prompt_tokens: int = 0
    num_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None

    def add(self, item: dict[str, Any]) -> None:
        """Take an item of the backend.

        Raises:
            ProtocolError: the item is an error.
        """
        if "error" in item:
            kind = "invalid_request_error" if item["status"] < 500 else "server_error"
            refusal = StaleInfo if item.get("stale_info") else ProtocolError
            raise refusal(item["status"], item["error"], kind=kind)
        self.prompt_tokens = item.get("prompt_tokens", self.prompt_tokens)
        self.text += item.get("text", "")
        self.num_tokens += item.get("num_tokens", 0)
        self.cached_tokens += item.get("cached_tokens", 0)
        self.finish_reason = item.get("finish_reason")

    def boxes(self) -> list[dict[str, Any]]:
        """Boxes of the text so far, in pixels."""
        return protocol.found_boxes(self.text, self.image_size, self.image_index)

    def usage(self) -> dict[str, Any]:
        """The ``usage`` field."""
        return protocol.usage(self.prompt_tokens, self.num_tokens, self.cached_tokens)

    def chunk(self, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": {"content": logprobs} if self.request.logprobs and logprobs else None,
            "finish_reason": self.finish_reason,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def completion(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """The whole answer."""
        message = {"role": "assistant", "content": self.text, "refusal": None, "boxes": self.boxes()}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": logprobs} if self.request.logprobs else None,
            "finish_reason": self.finish_reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The event that ``stream_options.include_usage`` asks for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}


class ChatService:
    """What the routes do."""

    def __init__(self, settings: ServeSettings, backend: Backend, metrics: Metrics) -> None:
        self.settings, self.backend, self.metrics = settings, backend, metrics
        self.media = MediaLoader(settings)
        parallel = settings.max_batch_size * max(settings.num_replicas, settings.max_replicas)
        self.gate = Gate(parallel + settings.max_queue, parallel)
        self._key_digests = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._info: ModelInfo | None = None

    async def info(self, refresh: bool = False) -> ModelInfo:
        """What the model is, asked once."""
        if self._info is None or refresh:
            self._info = await self.backend.describe()
        return self._info

    def check_key(self, request: Request) -> None:
        """Let a request through whose bearer token is known; in constant time, whatever it is.

        Raises:
            ProtocolError: 401.
        """
        if not self._key_digests:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip() if scheme.lower() == "bearer" else "")
        # A list, not a generator: every key is compared, so the time tells nothing.
        if not any([hmac.compare_digest(digest, known) for known in self._key_digests]):
            raise ProtocolError(
                401,
                "this server needs an API key: send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
            )

    async def chat(self, http_request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        started = time.perf_counter()
        self.gate.enter()
        self.metrics.in_flight.set(self.gate.in_flight)
        leave = _Once(lambda: self._leave(started))
        try:
            request = self._parse(await self._read_body(http_request))
            async with asyncio.timeout(self.settings.request_timeout_s):
                try:
                    return await self._answer(request, started, leave)
                except StaleInfo:  # a model with another image size has been deployed since we asked
                    await self.info(refresh=True)
                    return await self._answer(request, started, leave)
        except TimeoutError:
            raise _too_slow(self.settings) from None
        finally:
            if not leave.is_lent:
                leave()

    async def _answer(self, request: ChatRequest, started: float, leave: _Once) -> Response:
        answer, job = await self._prepare(request, started)
        if not request.stream:
            return await self._complete(answer, job)
        items = aiter(self.backend.stream(job))
        answer.add(await anext(items))  # what is wrong with the request shows here, before the status is sent
        self.metrics.requests.labels(200).inc()
        return EventStream(
            self._events(answer, items, leave),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    # ------------------------------------------------------------------ from bytes to a job

    async def _read_body(self, request: Request) -> bytes:
        limit = int(self.settings.max_body_mb * 1_000_000)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise ProtocolError(
                    413,
                    f"the request is larger than {self.settings.max_body_mb:g} MB: send fewer or smaller images.",
                    code="request_too_large",
                )
        return bytes(body)

    def _parse(self, body: bytes) -> ChatRequest:
        try:
            request = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            raise _validation_error(error) from None
        if request.model != self.settings.model_name:
            raise ProtocolError(
                404,
                f"the model {request.model[:80]!r} does not exist; this server has {self.settings.model_name!r}.",
                param="model",
                code="model_not_found",
            )
        return request

    async def _prepare(self, request: ChatRequest, started: float) -> tuple[Answer, ChatJob]:
        info = await self.info()
        turns = read_turns(request)
        images = await self.media.load(turns.image_urls, info.image_size)
        messages = turns.messages(images, request.task, request.box)
        size = (images[-1].width, images[-1].height) if images else None
        answer = Answer(
            request, f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), started, size, max(0, len(images) - 1)
        )
        sampling = request.sampling(self.settings.max_tokens, self.settings.temperature)
        return answer, ChatJob(messages, sampling, self.settings.stream_interval_ms / 1000)

    # ------------------------------------------------------------------ answers

    async def _complete(self, answer: Answer, job: ChatJob) -> Response:
        logprobs: list[dict[str, Any]] = []
        for item in await self.backend.complete(job):
            answer.add(item)
            logprobs += item.get("logprobs", [])
        self._count(answer)
        return JSONResponse(answer.completion(logprobs))

    async def _events(self, answer: Answer, items: AsyncIterator[dict[str, Any]], leave: _Once) -> AsyncIterator[str]:
        leave.is_lent = True
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                yield _event(answer.chunk({"role": "assistant", "content": ""}))
                async for item in items:
                    first = not answer.text
                    answer.add(item)
                    if first and answer.text:
                        self.metrics.first_token.observe(time.perf_counter() - answer.started)
                    if item["text"] or item["logprobs"]:
                        reason, answer.finish_reason = answer.finish_reason, None
                        yield _event(answer.chunk({"content": item["text"]}, item["logprobs"]))
                        answer.finish_reason = reason
                boxes = answer.boxes()
                yield _event(answer.chunk({"boxes": boxes} if boxes else {}))
                if answer.request.stream_options and answer.request.stream_options.include_usage:
                    yield _event(answer.usage_chunk())
                yield "data: [DONE]\n\n"
                self._count(answer)
        except ProtocolError as error:
            yield _event(error.body())
        except TimeoutError:
            yield _event(_too_slow(self.settings).body())
        except Exception:
            log.exception("a stream failed")
            yield _event(failed().body())
        finally:
            leave()
            await items.aclose()

    def _count(self, answer: Answer) -> None:
        if not answer.request.stream:
            self.metrics.requests.labels(200).inc()
        self.metrics.seconds.observe(time.perf_counter() - answer.started)
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("cached").inc(answer.cached_tokens)
        self.metrics.tokens.labels("answer").inc(answer.num_tokens)

    def _leave(self, started: float) -> None:
        self.gate.leave(time.perf_counter() - started)
        self.metrics.in_flight.set(self.gate.in_flight)


class EventStream(StreamingResponse):
    """A stream whose generator is closed when the client is gone, wherever that is noticed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


class _Once:
    """A function that runs once, whoever calls it first; ``is_lent`` says that somebody else will."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.is_lent = False
        self._done = False

    def __call__(self) -> None:
        if not self._done:
            self._done = True
            self.function()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def failed() -> ProtocolError:
    """What a client hears of an error that nobody foresaw."""
    return ProtocolError(500, "the server failed to answer; its log says why.", kind="server_error")


def _too_slow(settings: ServeSettings) -> ProtocolError:
    message = f"the answer took more than {settings.request_timeout_s:g} s and was given up."
    return ProtocolError(504, message, kind="server_error", code="timeout")


def _validation_error(error: ValidationError) -> ProtocolError:
    # Where several types were possible, the mistake that lies deepest is the one in the type that was meant.
    first = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
    # Tags of unions are part of pydantic's location, but not of the request.
    tags = {"system", "developer", "user", "assistant", "text", "image_url", "str"}
    where = [str(p) for p in first["loc"] if not (isinstance(p, str) and (p in tags or p.startswith("list[")))]
    if where == [] and first["loc"]:
        where = [str(first["loc"][0])]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param!r}."
    elif first["type"] == "json_invalid":
        message = f"the request is not valid JSON: {first['msg']}."
    else:
        message = f"{param or 'the request'}: {first['msg']}."
    return ProtocolError(400, message, param=param, code="invalid_value")
