"""Refusals of the API, in the shape of OpenAI's errors."""

from __future__ import annotations

from typing import Literal

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ProtocolError(Exception):
    """A refusal in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: one sentence for the person who wrote the request.
        kind: OpenAI's ``type``.
        param: the field that is wrong, e.g. ``messages.0.content``.
        code: OpenAI's machine-readable reason.
        retry_after_s: seconds to wait before the next try, with 429 and 503.
        closes: whether the connection ends with this answer, because the rest of the body is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: ErrorType = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after_s, self.closes = param, code, retry_after_s, closes

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON that clients get."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        headers = {}
        if self.retry_after_s:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.closes:
            headers["Connection"] = "close"
        return headers


def server_failed() -> ProtocolError:
    """An error that nobody foresaw; the log has the rest."""
    return ProtocolError(500, "the server failed to answer; its log says why.", kind="server_error")


def unavailable(message: str, param: str | None = None) -> ProtocolError:
    """Nothing is wrong with the request: asked again in seconds, it may have its answer."""
    return ProtocolError(503, message, kind="server_error", param=param, code="unavailable", retry_after_s=5)


def model_unavailable() -> ProtocolError:
    """No replica answers."""
    return unavailable("the model is not available; try again soon.")


def server_stops() -> ProtocolError:
    """The server answers what it has begun and takes nothing new."""
    return unavailable("the server stops.")


def too_busy(message: str, retry_after_s: int) -> ProtocolError:
    """The server has no room for this request."""
    return ProtocolError(
        429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=min(60, max(1, retry_after_s))
    )
