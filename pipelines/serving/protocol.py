"""OpenAI's chat-completions protocol as types, with this model's few extensions.

Extensions are additional fields, which OpenAI's clients pass through: in a request ``task``, ``box``, ``top_k`` and
``repetition_penalty``; in an answer ``boxes``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tinygptv.data.boxes import COLOURS, Box, parse_boxes, to_pixels


class ProtocolError(Exception):
    """A refusal in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: one sentence for the person who wrote the request.
        kind: OpenAI's ``type``.
        param: the field that is wrong, e.g. ``messages.0.content``.
        code: OpenAI's machine-readable reason.
        retry_after_s: seconds to wait before the next try, with 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON that clients get."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


# ---------------------------------------------------------------------------------------------------- request


class TextPart(BaseModel):
    """Words."""

    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    """Where a picture is: a ``data:`` URL, or http(s) where the server allows the host."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = Field(None, description="accepted; the model has one resolution")


class ImagePart(BaseModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class SystemMessage(BaseModel):
    """Standing instructions; the model was trained without, so they are put before the first question."""

    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(BaseModel):
    """A question, with or without pictures."""

    role: Literal["user"]
    content: str | list[Part]


class AssistantMessage(BaseModel):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | list[TextPart] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool = False


class ResponseFormat(BaseModel):
    """The form of the answer; this model writes text."""

    type: Literal["text"]


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=1, description="one answer per request")
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="token id -> number in -100..100")
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="accepted and not used")
    metadata: dict[str, str] | None = Field(None, description="accepted and not used")
    store: bool | None = Field(None, description="accepted and not used: nothing is stored")

    task: Literal["vqa", "caption", "refer", "identify", "grounding", "detection"] | None = Field(
        None, description="extension: word the last question as this task"
    )
    box: tuple[float, float, float, float] | None = Field(
        None, description="extension: x1, y1, x2, y2 in pixels of the last picture, for task identify"
    )
    top_k: int | None = Field(None, ge=0, description="extension: most probable tokens to draw from; 0 is all")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="extension")

    @field_validator("stop")
    @classmethod
    def _stop_is_usable(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > 4 or not all(strings):
            raise ValueError("stop takes up to 4 strings, none of them empty")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias_is_usable(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10) or not -100 <= bias <= 100:
                raise ValueError("logit_bias maps token ids to numbers in -100..100")
        return value

    def sampling(self, max_tokens: int, temperature: float) -> dict[str, Any]:
        """Fields of ``tinygptv.inference.sampling.SamplingParams``; the arguments stand in where the request names
        none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": self.max_completion_tokens or self.max_tokens or max_tokens,
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": self.top_k or 0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            "seed": self.seed,
            "stop": tuple(stop),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }


# ---------------------------------------------------------------------------------------------------- answer


class FoundBox(BaseModel):
    """Extension: a box that the answer names.

    ``box`` is x1, y1, x2, y2 in pixels of the picture as it was sent (upright); boxes of one phrase share ``entity``.
    """

    label: str
    box: tuple[float, float, float, float]
    entity: int
    colour: str
    image: int = Field(description="index of the picture among those of the request")


class Usage(BaseModel):
    """Tokens; an image counts as its query tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class TopLogprob(BaseModel):
    """A token that was probable."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token that was drawn."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    boxes: list[FoundBox] = []


class Choice(BaseModel):
    """One answer and why it ended."""

    index: int = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """What ``POST /v1/chat/completions`` answers."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """A model on offer."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinygptv"


class ModelList(BaseModel):
    """What ``GET /v1/models`` answers."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


def found_boxes(text: str, size: tuple[int, int] | None, image: int) -> list[dict[str, Any]]:
    """Boxes of an answer in pixels of the picture of this size; none where the request had no picture."""
    if size is None:
        return []
    boxes = []
    for grounded in parse_boxes(text):
        clipped: Box = tuple(min(max(v, 0.0), 100.0) for v in grounded.box)  # type: ignore[assignment]
        pixels = tuple(round(v, 2) for v in to_pixels(clipped, *size))
        colour = "#{:02x}{:02x}{:02x}".format(*COLOURS[grounded.entity % len(COLOURS)])
        found = FoundBox(label=grounded.phrase, box=pixels, entity=grounded.entity, colour=colour, image=image)  # type: ignore[arg-type]
        boxes.append(found.model_dump())
    return boxes


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The ``usage`` field."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
