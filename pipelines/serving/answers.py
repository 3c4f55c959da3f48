"""OpenAI's chat completions as types: answers, models, errors; and an answer as it grows from the backend's items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, Field
from typing_extensions import TypedDict  # typing's own is not known to pydantic before Python 3.12

from pipelines.serving.backend import Failure, Item, PromptRead, TokenLogprob, TokenProbability
from pipelines.serving.errors import ProtocolError
from pipelines.serving.protocol import Coordinates
from tinygptv.data.boxes import COLOURS, parse_boxes, to_pixels

FinishReason = Literal["stop", "length"]


class FoundBox(TypedDict):
    """Extension: a box that the answer names.

    ``box`` is x1, y1, x2, y2 in pixels of the image as it was sent (upright); boxes of one phrase share ``entity``.
    """

    label: str
    box: Coordinates
    entity: int
    colour: str
    image: Annotated[int, Field(description="index of the image among those of the request")]


class Usage(TypedDict):
    """Tokens; an image counts as its query tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Logprobs(TypedDict):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob]


class AnswerMessage(TypedDict):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None
    boxes: list[FoundBox]


class Choice(TypedDict):
    """One answer and why it ended."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(TypedDict):
    """Response of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(TypedDict, total=False):
    """What an event adds to the answer."""

    role: Literal["assistant"]
    content: str
    boxes: list[FoundBox]


class ChunkChoice(TypedDict):
    """The one choice of an event."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class Chunk(TypedDict):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage]


class Model(BaseModel):
    """The served model; what is not OpenAI's tells the web page what the model can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinygptv"
    context_length: int = Field(description="extension: most tokens of prompt and answer")
    max_model_len: int = Field(description="extension: the same by vLLM's name, which clients read")
    scope: str = Field(description="extension: images that the model knows")


class ModelList(BaseModel):
    """Response of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """Error message, type and code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


@dataclass
class Answer:
    """An answer that is being written.

    Attributes:
        id: of the completion.
        model: the name that the request used.
        created: seconds since 1970.
        with_logprobs: whether the request asked for log-probabilities.
        image_size: width and height of the image that boxes lie on; None without images.
        image_index: which of the request's images that is.
    """

    id: str
    model: str
    created: int
    with_logprobs: bool
    image_size: tuple[int, int] | None
    image_index: int
    text: str = ""
    prompt_tokens: int = 0
    num_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None

    def add(self, item: Item) -> None:
        """Take an item of the backend.

        Raises:
            ProtocolError: the item is a failure.
        """
        if isinstance(item, Failure):
            raise item.error()
        if isinstance(item, PromptRead):
            self.prompt_tokens = item.prompt_tokens
            return
        self.text += item.text
        self.num_tokens += item.num_tokens
        self.cached_tokens += item.cached_tokens
        self.finish_reason = item.finish_reason

    def boxes(self) -> list[FoundBox]:
        """Boxes of the text so far, in pixels."""
        return find_boxes(self.text, self.image_size, self.image_index)

    def usage(self) -> Usage:
        """The ``usage`` field."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def first_events(self) -> list[str]:
        """What opens a stream, as it is sent."""
        return [self._event({"role": "assistant", "content": ""})]

    def text_event(self, text: str, logprobs: tuple[TokenProbability, ...]) -> str:
        """What adds text to a stream."""
        return self._event({"content": text}, logprobs=self._logprobs(logprobs) if logprobs else None)

    def last_events(self, with_usage: bool) -> list[str]:
        """What ends a stream: why the answer ended, its boxes, and what ``stream_options.include_usage`` asks for."""
        boxes = self.boxes()
        last = self._event({"boxes": boxes} if boxes else {}, finish_reason=self.finish_reason)
        usage = [to_event({**self._chunk([]), "usage": self.usage()})] if with_usage else []
        return [last, *usage, "data: [DONE]\n\n"]

    def error_events(self, error: ProtocolError) -> list[str]:
        """What ends a stream without the rest of its answer."""
        return [to_event(error.body())]

    def completion(self, logprobs: tuple[TokenProbability, ...]) -> ChatCompletion | Mapping[str, object]:
        """The whole answer."""
        choice: Choice = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": self.text,
                "refusal": None,
                "boxes": self.boxes(),
            },
            "logprobs": self._logprobs(logprobs),
            "finish_reason": self.finish_reason,
        }
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [choice],
            "usage": self.usage(),
        }

    def _event(
        self, delta: Delta, *, logprobs: Logprobs | None = None, finish_reason: FinishReason | None = None
    ) -> str:
        choice: ChunkChoice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return to_event(self._chunk([choice]))

    def _chunk(self, choices: list[ChunkChoice]) -> Chunk:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, entries: tuple[TokenProbability, ...]) -> Logprobs | None:
        return {"content": [entry.to_json() for entry in entries]} if self.with_logprobs else None


def to_event(data: Mapping[str, object], name: str = "") -> str:
    """A server-sent event.

    Args:
        data: sent as JSON.
        name: of the event, where it has one.
    """
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def find_boxes(text: str, size: tuple[int, int] | None, image: int) -> list[FoundBox]:
    """Boxes of an answer, clipped to its image, in the image's pixels.

    Args:
        text: an answer.
        size: width and height of the image; None where the request has none, and so no boxes.
        image: index of the image.
    """
    if size is None:
        return []
    found = []
    for grounded in parse_boxes(text):
        x1, y1, x2, y2 = to_pixels([min(max(v, 0.0), 100.0) for v in grounded.box], *size)
        colour = "#{:02x}{:02x}{:02x}".format(*COLOURS[grounded.entity % len(COLOURS)])
        box = (round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2))
        found.append(FoundBox(label=grounded.phrase, box=box, entity=grounded.entity, colour=colour, image=image))
    return found
