"""Answers of OpenAI's Responses API as types; and an answer as it grows, in its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from typing_extensions import TypedDict  # typing's own is not known to pydantic before Python 3.12

from pipelines.serving.answers import Answer, FoundBox, to_event
from pipelines.serving.backend import SamplingFields, TokenLogprob, TokenProbability
from pipelines.serving.errors import ProtocolError
from pipelines.serving.responses import ResponsesRequest

Status = Literal["completed", "incomplete", "in_progress", "failed"]


class OutputText(TypedDict):
    """The text of an answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """The answer; ``boxes`` is the extension of chat's messages."""

    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]
    boxes: list[FoundBox]


class ResponseUsage(TypedDict):
    """Tokens; an image counts as its query tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(TypedDict):
    """Response of ``POST /v1/responses``."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: Literal[False]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, None]
    store: Literal[False]
    temperature: float
    text: dict[str, dict[str, str]]
    tool_choice: Literal["auto"]
    tools: list[str]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


@dataclass
class ResponseAnswer(Answer):
    """An answer in the shape of the Responses API.

    Attributes:
        asked: what it repeats.
        sampling: how it is drawn.
    """

    asked: ResponsesRequest = field(kw_only=True)
    sampling: SamplingFields = field(kw_only=True)
    logprobs: tuple[TokenProbability, ...] = ()
    num_events: int = 0

    def completion(self, logprobs: tuple[TokenProbability, ...]) -> Mapping[str, object]:
        """The whole answer."""
        self.logprobs = logprobs
        return self._response(self._status())

    def first_events(self) -> list[str]:
        """The events that open a stream."""
        started = self._response("in_progress")
        empty: OutputText = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return [
            self._named("response.created", response=started),
            self._named("response.in_progress", response=started),
            self._named("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._named("response.content_part.added", **self._place(), part=empty),
        ]

    def text_event(self, text: str, logprobs: tuple[TokenProbability, ...]) -> str:
        """An event with text."""
        self.logprobs += logprobs
        return self._named("response.output_text.delta", **self._place(), delta=text, logprobs=self._listed(logprobs))

    def last_events(self, with_usage: bool) -> list[str]:
        """The events that end a stream; ``with_usage`` is chat's matter."""
        status = self._status()
        message = self._message(status)
        text = {"text": self.text, "logprobs": self._listed(self.logprobs)}
        return [
            self._named("response.output_text.done", **self._place(), **text),
            self._named("response.content_part.done", **self._place(), part=message["content"][0]),
            self._named("response.output_item.done", output_index=0, item=message),
            self._named(f"response.{status}", response=self._response(status)),
        ]

    def error_events(self, error: ProtocolError) -> list[str]:
        """The events that end a stream without the rest of its answer."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        # As OpenAI's documentation has the event, and as its server sends it and its clients read it.
        told = error.body()
        return [self._named("error", **told["error"], **told), self._named("response.failed", response=response)]

    def _named(self, kind: str, **fields: object) -> str:
        self.num_events += 1
        return to_event({**fields, "type": kind, "sequence_number": self.num_events - 1}, kind)

    def _place(self) -> dict[str, object]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    @property
    def _message_id(self) -> str:
        return self.id.replace("resp_", "msg_")

    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self.finish_reason == "length" else "completed"

    def _listed(self, entries: tuple[TokenProbability, ...]) -> list[TokenLogprob]:
        return [entry.to_json() for entry in entries] if self.with_logprobs else []

    def _message(self, status: Status) -> OutputMessage:
        text: OutputText = {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": self._listed(self.logprobs),
        }
        begun = status == "in_progress"
        return {
            "type": "message",
            "id": self._message_id,
            "status": status,
            "role": "assistant",
            "content": [] if begun else [text],
            "boxes": [] if begun else self.boxes(),
        }

    def _response(self, status: Status) -> ResponseObject:
        has_ended = status in ("completed", "incomplete")
        usage: ResponseUsage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.num_tokens,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.asked.instructions,
            "max_output_tokens": self.asked.max_output_tokens,
            "metadata": self.asked.metadata or {},
            "model": self.model,
            "output": [self._message(status)] if has_ended else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.sampling["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": self.sampling["logprobs"] or 0,
            "top_p": self.sampling["top_p"],
            "truncation": "disabled",
            "usage": usage if has_ended else None,
            "user": self.asked.user,
        }
