"""The HTTP API: FastAPI routes in OpenAI's shape, over any ``Backend``.

Every answer that is not a success has OpenAI's error body; none holds a path or a stack trace.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.params import Depends as DependsParam
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.answers import ChatCompletion, ErrorBody, Model, ModelList
from pipelines.serving.backend import Backend
from pipelines.serving.clients import ClientIdentifier, key_digests
from pipelines.serving.decoders import ImageDecoders
from pipelines.serving.errors import ProtocolError, server_failed, server_stops
from pipelines.serving.metrics import IngressMetrics, Metrics, render
from pipelines.serving.pages import add_pages
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.response_answers import ResponseObject
from pipelines.serving.responses import ResponsesRequest
from pipelines.serving.scenes import DrawnScene, draw_scene
from pipelines.serving.service import ChatService, unknown_model
from pipelines.settings import ServeSettings
from tinygptv import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"

Responses = dict[int | str, dict[str, Any]]
"""FastAPI's ``responses``: status -> its description and the type of its body."""

ERRORS: Responses = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is wrong",
        401: "the API key is missing or wrong",
        404: "no such model",
        408: "the request's body came too slowly",
        413: "the request or an image is too large",
        415: "the request's body is compressed",
        429: "too many requests; see Retry-After",
        500: "the model failed",
        503: "the model is not available; see Retry-After",
        504: "the answer took too long",
    }.items()
}
CHAT_RESPONSES: Responses = {
    200: {"description": "the answer", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    **ERRORS,
}
CHAT_ONLY = {"messages", "max_tokens", "max_completion_tokens", "n", "stream_options", "logprobs", "response_format"}
"""Fields of a chat request that the Responses API names otherwise or not at all; it takes the others."""


def _body_of(kind: type[BaseModel]) -> dict[str, object]:
    """What the schema says of a body that is read by hand."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def build_api(
    settings: ServeSettings,
    backend: Backend,
    metrics: Metrics | None = None,
    *,
    digests: Sequence[bytes] | None = None,
    decoders: ImageDecoders | None = None,
    all_metrics: Callable[[], Awaitable[Sequence[IngressMetrics]]] | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        settings: bounds, keys, names.
        backend: the model.
        metrics: counters that the backend shares with the API.
        digests: of the accepted API keys; None takes the settings' keys.
        decoders: processes that several applications share.
        all_metrics: counters of every ingress, where there are several.

    Returns:
        The application; ``state.gate`` is its admission.
    """
    metrics = metrics or Metrics()
    clients = ClientIdentifier(key_digests(settings) if digests is None else digests, settings.trusted_proxies)
    service = ChatService(settings, backend, metrics, clients, decoders)
    app = FastAPI(
        title="TinyGPT-V",
        description="Chat about images, in the shape of OpenAI's chat completions and responses.",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.gate = service.gate

    def operator_page(request: Request) -> None:
        """Pages for operators: behind the key, unless the settings open them."""
        if _path_of(request.scope) not in settings.open_paths:
            clients.identify_browser(request)

    _add_chat(app, service, [Depends(clients.identify)])
    _add_health(app, service)
    _add_metrics(app, service, operator_page, all_metrics)

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(operator_page)])
    async def openapi() -> JSONResponse:
        return JSONResponse(_schema(app, settings.model_name))

    add_pages(app, operator_page)
    _add_errors(app, service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(SlashesAsOne)
    return app


def _add_chat(app: FastAPI, service: ChatService, keyed: Sequence[DependsParam]) -> None:
    """OpenAI's routes, and the scenes of the web page."""
    served = service.settings.model_name

    @app.post(CHAT, response_model=ChatCompletion, responses=CHAT_RESPONSES, openapi_extra=_body_of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation; with stream, as server-sent events."""
        return await service.chat(request)

    @app.post(
        RESPONSES,
        response_model=ResponseObject,
        responses=CHAT_RESPONSES,
        openapi_extra=_body_of(ResponsesRequest),
    )
    async def responses(request: Request) -> Response:
        """The same in the shape of OpenAI's Responses API; nothing is stored."""
        return await service.chat(request, ResponsesRequest)

    @app.get("/v1/models", response_model=ModelList, responses=_only(401, 503), dependencies=keyed)
    async def list_models() -> ModelList:
        """The served model."""
        return ModelList(data=[await _model()])

    @app.get("/v1/models/{model_id:path}", response_model=Model, responses=_only(401, 404, 503), dependencies=keyed)
    async def get_model(model_id: str) -> Model:
        """One model."""
        if model_id != served:
            raise unknown_model(model_id, served)
        return await _model()

    async def _model() -> Model:
        info = await service.info()
        return Model(
            id=served,
            created=info.created,
            context_length=info.context_length,
            max_model_len=info.context_length,
            scope=info.scope,
        )

    @app.get("/ui/scene", response_model=DrawnScene, include_in_schema=False, dependencies=keyed)
    async def new_scene() -> DrawnScene:
        if (await service.info()).scope != "drawn scenes":
            raise ProtocolError(404, "the served model does not know drawn scenes.")
        return await asyncio.to_thread(draw_scene)


def _add_health(app: FastAPI, service: ChatService) -> None:
    @app.get("/health", include_in_schema=False)  # vLLM's, SGLang's and llama.cpp's name, which GuideLLM asks for
    @app.get("/healthz", responses=_only(503))
    async def healthz() -> dict[str, str]:
        """Whether the model can answer."""
        if service.gate.is_closed:
            raise server_stops()
        try:
            async with asyncio.timeout(5):
                await service.backend.check_health()
        except Exception:
            logger.warning("the model cannot answer", exc_info=True)
            raise ProtocolError(
                503, "the model cannot answer.", kind="server_error", code="not_ready", retry_after_s=5
            ) from None
        return {"status": "ok"}


def _add_metrics(
    app: FastAPI,
    service: ChatService,
    guard: Callable[[Request], None],
    all_metrics: Callable[[], Awaitable[Sequence[IngressMetrics]]] | None,
) -> None:
    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **_only(401)},
        dependencies=[Depends(guard)],
    )
    async def show_metrics() -> Response:
        """Counters, for Prometheus."""
        replicas = await _within(3, service.backend.stats(), "the model", [])
        own = [service.metrics.snapshot()]
        ingresses = await _within(3, all_metrics(), "other ingresses", own) if all_metrics else own
        return Response(render(ingresses, replicas), media_type="text/plain; version=0.0.4; charset=utf-8")


class HeadAsGet:
    """Answers HEAD as GET, without the body: monitors and load balancers ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


class SlashesAsOne:
    """Takes ``/v1//models`` and ``/v1/models/`` for ``/v1/models``: base URLs are written with a slash at the end and
    without. A redirect would name an address of this server, which behind a proxy is another one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            names = [name for name in _path_of(scope).split("/") if name]
            if names[:1] == ["v1"]:
                scope = {**scope, "path": scope.get("root_path", "") + "/" + "/".join(names)}
        await self.app(scope, receive, send)


def _path_of(scope: Scope) -> str:
    """The path below the application's own, Ray Serve's ``route_prefix``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _within(seconds: float, result: Awaitable[T], source: str, default: T) -> T:
    """A result, or the default where there is none in time."""
    try:
        async with asyncio.timeout(seconds):
            return await result
    except Exception:
        logger.warning("no counters from %s", source, exc_info=True)
        return default


def _add_errors(app: FastAPI, service: ChatService) -> None:
    @app.exception_handler(ProtocolError)
    async def protocol_error(request: Request, error: ProtocolError) -> Response:
        if _path_of(request.scope) in (CHAT, RESPONSES):
            service.metrics.requests.labels(error.status).inc()
        headers = error.headers()
        if error.status == 401 and not _path_of(request.scope).startswith("/v1"):
            headers["WWW-Authenticate"] = 'Basic realm="API key as password"'
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {request.url.path}: {error.detail}. This server has {_endpoints(app)}."
        refusal = ProtocolError(error.status_code, told)
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("request failed", exc_info=error)
        return await protocol_error(request, server_failed())


def _endpoints(app: FastAPI) -> str:
    """What can be asked for, in words."""
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.include_in_schema]
    return ", ".join(f"{method} {route.path_format}" for route in routes for method in sorted(route.methods or ()))


def _schema(app: FastAPI, model_name: str) -> dict[str, Any]:
    """The OpenAPI schema with the types of the bodies: they are read by hand, so FastAPI does not know them."""
    schema = copy.deepcopy(app.openapi())
    template = "#/components/schemas/{model}"
    chat, response = (kind.model_json_schema(ref_template=template) for kind in (ChatRequest, ResponsesRequest))
    options = {name: field for name, field in chat["properties"].items() if name not in CHAT_ONLY}
    response["properties"] = {**options, **response["properties"]}
    for request in (chat, response):
        request["properties"]["model"]["enum"] = [model_name]
        schema["components"]["schemas"].update({**request.pop("$defs"), request["title"]: request})
    return schema


def _only(*statuses: int) -> Responses:
    return {status: ERRORS[status] for status in statuses}
