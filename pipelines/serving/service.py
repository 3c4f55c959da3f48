"""A chat request: from the body to the model, and from the model to JSON or events.

key -> body within bounds -> a slot -> types -> images -> its turn -> model -> JSON, or events
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pipelines.serving.answers import Answer
from pipelines.serving.backend import Backend, ChatJob, Item, ModelInfo, Piece, StaleImage, TokenProbability
from pipelines.serving.body import BodyReader
from pipelines.serving.clients import Client, ClientIdentifier
from pipelines.serving.decoders import ImageDecoders
from pipelines.serving.errors import ProtocolError, server_failed
from pipelines.serving.gate import Gate
from pipelines.serving.line import AT_MODEL, Line
from pipelines.serving.media import MediaLoader
from pipelines.serving.metrics import Metrics
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.response_answers import ResponseAnswer
from pipelines.serving.responses import ResponsesRequest
from pipelines.serving.turns import read_turns
from pipelines.settings import ServeSettings

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status under which requests are counted whose client left before the answer (nginx's number)."""


@dataclass(frozen=True)
class _Call:
    """One request in flight: who asks what, since when and until when (clock of the event loop, in seconds).

    ``asked`` is what ``request`` was made of, where the client spoke the Responses API and is answered in it.
    """

    client: Client
    request: ChatRequest
    asked: ResponsesRequest | None
    started: float
    deadline: float


class ChatService:
    """Handlers of the routes."""

    def __init__(
        self,
        settings: ServeSettings,
        backend: Backend,
        metrics: Metrics,
        clients: ClientIdentifier,
        decoders: ImageDecoders | None = None,
    ) -> None:
        self.settings, self.backend, self.metrics, self.clients = settings, backend, metrics, clients
        self.bodies = BodyReader(settings)
        self.media = MediaLoader(settings, decoders)
        parallel = settings.max_batch_size * max(settings.num_replicas, settings.max_replicas)
        self.gate = Gate(parallel + settings.max_queue, parallel, settings.max_per_client, metrics.in_flight.set)
        self.line = Line(AT_MODEL * parallel)
        self._info: ModelInfo | None = None

    async def info(self, refresh: bool = False) -> ModelInfo:
        """Metadata of the model, requested once."""
        if self._info is None or refresh:
            self._info = await self.backend.describe()
        return self._info

    async def chat(
        self, http_request: Request, kind: type[ChatRequest] | type[ResponsesRequest] = ChatRequest
    ) -> Response:
        """``POST /v1/chat/completions``, or ``/v1/responses``.

        Args:
            http_request: its body is not read yet.
            kind: the type of request.

        Raises:
            ProtocolError: why there is no answer.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            client = self.clients.identify(http_request)
            body = await self.bodies.read(http_request, client.name)
            with ExitStack() as slot:
                slot.enter_context(self.gate.admit(client.name))
                parsed = await self.bodies.parse(body, kind)
                del body  # as large as its images, which wait for their answer in the request already
                asked, request = (None, parsed) if isinstance(parsed, ChatRequest) else (parsed, parsed.chat)
                self._check_model(request)
                call = _Call(client, request, asked, started, clock() + self.settings.request_timeout_s)
                return await self._answer(call, slot)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            self.metrics.requests.labels(CLIENT_CLOSED_REQUEST).inc()
            if isinstance(error, ClientDisconnect):
                return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it
            raise

    def _check_model(self, request: ChatRequest) -> None:
        if request.model != self.settings.model_name:
            raise unknown_model(request.model, self.settings.model_name)

    async def _answer(self, call: _Call, slot: ExitStack) -> Response:
        """The response; a stream takes ``slot`` over and releases it at its end."""
        try:
            async with asyncio.timeout_at(call.deadline):
                answer, job = await self._prepare(call)
                await self.line.enter(call.client.name)
                slot.callback(self.line.leave)
                try:
                    return await self._respond(call, answer, job, slot)
                except StaleImage:  # a model with another image size has been deployed since we asked
                    await self.info(refresh=True)
                    answer, job = await self._prepare(call)
                    return await self._respond(call, answer, job, slot)
        except TimeoutError:
            raise _too_slow(self.settings) from None
        except ProtocolError as error:
            if call.asked:
                error.param = call.asked.field_of(error.param)
            raise

    async def _respond(self, call: _Call, answer: Answer, job: ChatJob, slot: ExitStack) -> Response:
        if not call.request.stream:
            return await self._complete(call, answer, job)
        items = self.backend.stream(job)
        try:
            answer.add(await anext(items))  # what is wrong with the request shows here, before the status is sent
        except BaseException:
            await items.aclose()
            raise
        self.metrics.requests.labels(200).inc()
        return EventStream(self._events(call, answer, items), items, slot.pop_all().close)

    async def _prepare(self, call: _Call) -> tuple[Answer, ChatJob]:
        info = await self.info()
        turns = read_turns(call.request)
        request = turns.with_default_task(call.request, self.settings.default_task)
        images = await self.media.load(turns.images, info.image_size, call.client.name)
        sampling = request.sampling(self.settings.max_tokens, self.settings.temperature)
        begin: Callable[..., Answer] = Answer
        if call.asked:
            begin = partial(ResponseAnswer, asked=call.asked, sampling=sampling)
        answer = begin(
            id=f"{'resp_' if call.asked else 'chatcmpl-'}{uuid.uuid4().hex}",
            model=request.model,
            created=int(time.time()),
            with_logprobs=bool(request.logprobs),
            image_size=(images[-1].width, images[-1].height) if images else None,
            image_index=max(0, len(images) - 1),
        )
        job = ChatJob(
            turns.messages(images, request),
            sampling,
            self.settings.stream_interval_ms / 1000,
            call.client.salt,
        )
        return answer, job

    async def _complete(self, call: _Call, answer: Answer, job: ChatJob) -> Response:
        logprobs: tuple[TokenProbability, ...] = ()
        for item in await self.backend.complete(job):
            answer.add(item)
            if isinstance(item, Piece):
                logprobs += item.logprobs
        self.metrics.requests.labels(200).inc()
        self._count(call, answer)
        return JSONResponse(answer.completion(logprobs))

    async def _events(
        self, call: _Call, answer: Answer, items: AsyncGenerator[Item, None]
    ) -> AsyncGenerator[str, None]:
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout_at(call.deadline):
                has_begun = False
                async for item in items:
                    is_first = not answer.text
                    answer.add(item)
                    if not has_begun:  # not before: benchmark clients take this event for the first token
                        has_begun = True
                        for event in answer.first_events():
                            yield event
                    if is_first and answer.text:
                        self.metrics.first_token.observe(clock() - call.started)
                    if isinstance(item, Piece) and (item.text or item.logprobs):
                        yield answer.text_event(item.text, item.logprobs)
                options = call.request.stream_options
                for event in answer.last_events(with_usage=bool(options and options.include_usage)):
                    yield event
                self._count(call, answer)
                return
        except ProtocolError as refusal:
            error = refusal
        except TimeoutError:
            error = _too_slow(self.settings)
        except Exception:
            logger.exception("a stream failed")
            error = server_failed()
        for event in answer.error_events(error):
            yield event

    def _count(self, call: _Call, answer: Answer) -> None:
        self.metrics.seconds.observe(asyncio.get_running_loop().time() - call.started)
        self.metrics.tokens.labels("prompt").inc(answer.prompt_tokens)
        self.metrics.tokens.labels("cached").inc(answer.cached_tokens)
        self.metrics.tokens.labels("answer").inc(answer.num_tokens)


class EventStream(StreamingResponse):
    """Server-sent events; however the stream ends, its source is closed and then ``on_close`` is called."""

    def __init__(
        self, events: AsyncGenerator[str, None], source: AsyncGenerator[Item, None], on_close: Callable[[], None]
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.events, self.source, self.on_close = events, source, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            async with aclosing(self.source), aclosing(self.events):  # its events may never have been asked for
                await super().__call__(scope, receive, send)
        finally:
            self.on_close()


def unknown_model(name: str, served: str) -> ProtocolError:
    """The request names another model."""
    return ProtocolError(
        404,
        f"the model {name[:80]!r} does not exist; this server has {served!r}.",
        param="model",
        code="model_not_found",
    )


def _too_slow(settings: ServeSettings) -> ProtocolError:
    message = f"the answer took more than {settings.request_timeout_s:g} s; it was cancelled."
    return ProtocolError(504, message, kind="server_error", code="timeout")
