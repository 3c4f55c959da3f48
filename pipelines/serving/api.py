"""The HTTP API: FastAPI routes in OpenAI's shape, over any ``Backend``.

Every answer that is not a success has OpenAI's error body; none holds a path or a stack trace.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from pipelines.serving import protocol
from pipelines.serving.backend import Backend
from pipelines.serving.metrics import Metrics
from pipelines.serving.pages import add_pages
from pipelines.serving.protocol import ChatRequest, ProtocolError
from pipelines.serving.service import ChatService, failed
from pipelines.settings import ServeSettings

log = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody, "description": text}
    for status, text in {
        400: "the request is wrong",
        401: "the API key is missing or wrong",
        404: "no such model",
        413: "the request or an image is too large",
        429: "too many requests; see Retry-After",
        500: "the model failed",
        503: "the model is not there; see Retry-After",
        504: "the answer took too long",
    }.items()
}
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
    }
}


def build_api(settings: ServeSettings, backend: Backend, metrics: Metrics | None = None) -> FastAPI:
    """The ASGI application.

    Args:
        settings: bounds, keys, names.
        backend: the model.
        metrics: counters that the backend shares with the API.
    """
    service = ChatService(settings, backend, metrics or Metrics())
    app = FastAPI(
        title="TinyGPT-V",
        description="Chat with pictures, in the shape of OpenAI's chat completions.",
        docs_url=None,
        redoc_url=None,
    )
    keyed = [Depends(service.check_key)]

    @app.post(
        "/v1/chat/completions",
        response_model=protocol.ChatCompletion,
        responses=ERRORS,
        openapi_extra=REQUEST_BODY,
        dependencies=keyed,
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation; with stream, as server-sent events."""
        return await service.chat(request)

    @app.get("/v1/models", response_model=protocol.ModelList, responses=_only(401, 503), dependencies=keyed)
    async def list_models() -> dict[str, Any]:
        """The model on offer."""
        return {"object": "list", "data": [await _model()]}

    @app.get("/v1/models/{model_id}", response_model=protocol.Model, responses=_only(401, 404, 503), dependencies=keyed)
    async def get_model(model_id: str) -> dict[str, Any]:
        """One model."""
        if model_id != settings.model_name:
            raise ProtocolError(
                404, f"the model {model_id[:80]!r} does not exist.", param="model", code="model_not_found"
            )
        return await _model()

    async def _model() -> dict[str, Any]:
        created = (await service.info()).created
        return {"id": settings.model_name, "object": "model", "created": created, "owned_by": "tinygptv"}

    @app.get("/healthz", responses=_only(503))
    async def healthz() -> dict[str, str]:
        """Whether the model answers."""
        try:
            async with asyncio.timeout(5):
                await service.info(refresh=True)
        except Exception:
            raise ProtocolError(
                503, "the model does not answer.", kind="server_error", code="not_ready", retry_after_s=5
            ) from None
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """Counters, for Prometheus."""
        try:
            async with asyncio.timeout(3):
                replicas = await backend.stats()
        except Exception:
            log.warning("no statistics from the model", exc_info=True)
            replicas = []
        return Response(service.metrics.render(replicas), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_pages(app, settings)
    _add_errors(app, service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _describe_request(app, settings.model_name)
    return app


def _add_errors(app: FastAPI, service: ChatService) -> None:
    @app.exception_handler(ProtocolError)
    async def protocol_error(request: Request, error: ProtocolError) -> Response:
        if request.url.path == "/v1/chat/completions":
            service.metrics.requests.labels(error.status).inc()
        headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s else {}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        refusal = ProtocolError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse(refusal.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return await protocol_error(request, failed())


def _describe_request(app: FastAPI, model_name: str) -> None:
    """Put ``ChatRequest`` into the OpenAPI schema: the body is read by hand, so FastAPI does not know its type."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        schema = generate()
        request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        request["properties"]["model"]["enum"] = [model_name]
        schema["components"]["schemas"].update({**request.pop("$defs"), "ChatRequest": request})
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: ERRORS[status] for status in statuses}
