"""Interface between an ingress and the model. ``model_backend`` answers in its own process.

Only plain values cross this border (frozen dataclasses), because with Ray Serve it lies between two processes, and the
ingress does not load torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Literal, NotRequired, Protocol

from typing_extensions import TypedDict  # the schema of the API is made from TokenLogprob

from pipelines.serving.errors import ErrorType, ProtocolError
from tinygptv.data.conversation import ChatImage, ChatMessage, image_number


class SamplingFields(TypedDict):
    """Fields of ``tinygptv.inference.sampling.SamplingParams`` that a request decides."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    ignore_end: bool


@dataclass(frozen=True)
class ChatJob:
    """One request for the model.

    Attributes:
        messages: user and assistant in turn.
        sampling: how the answer is drawn.
        interval_s: shortest time between two pieces of a stream, in seconds.
        salt: of the client; see ``clients.Client``.
    """

    messages: tuple[ChatMessage[ChatImage], ...]
    sampling: SamplingFields
    interval_s: float = 0.0
    salt: int = 0

    @property
    def conversation(self) -> str:
        """Session key of a conversation: its first image, or the user's first words."""
        numbers = [image.number for message in self.messages for image in message.images]
        words = next((m.text for m in self.messages if m.role == "user" and m.text), "")
        return str(numbers[0] if numbers else image_number(words.encode()))


@dataclass(frozen=True)
class ModelInfo:
    """Metadata of the model for an ingress.

    Attributes:
        image_size: side R in pixels.
        context_length: most tokens of prompt and answer.
        created: when it was loaded, in seconds since 1970.
        scope: images that it knows, e.g. ``photographs``.
    """

    image_size: int
    context_length: int
    created: int
    scope: str = ""


class TokenLogprob(TypedDict):
    """A token in OpenAI's shape; only the one that was drawn has ``top_logprobs``."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: NotRequired[list[TokenLogprob]]


@dataclass(frozen=True)
class TokenProbability:
    """A token with its log-probability, and the most probable ones at its position."""

    token: str
    logprob: float
    data: bytes
    alternatives: tuple[TokenProbability, ...] | None = None

    def to_json(self) -> TokenLogprob:
        """OpenAI's shape."""
        entry: TokenLogprob = {"token": self.token, "logprob": self.logprob, "bytes": list(self.data)}
        if self.alternatives is not None:
            entry["top_logprobs"] = [other.to_json() for other in self.alternatives]
        return entry


@dataclass(frozen=True)
class PromptRead:
    """First item of an answer: the request is good, and its prompt has so many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one has a ``finish_reason``."""

    text: str
    num_tokens: int = 1
    cached_tokens: int = 0
    logprobs: tuple[TokenProbability, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None


FailureKind = Literal["request", "too_long", "stale_image", "unavailable", "model"]


class _Refusal(TypedDict):
    """Fields of the ``ProtocolError`` for a kind of failure."""

    status: int
    kind: NotRequired[ErrorType]
    param: NotRequired[str]
    code: NotRequired[str]
    retry_after_s: NotRequired[int]


_FAILURES: Mapping[FailureKind, _Refusal] = {
    "request": {"status": 400},
    "too_long": {"status": 400, "param": "messages", "code": "context_length_exceeded"},
    "stale_image": {"status": 503, "kind": "server_error", "code": "unavailable", "retry_after_s": 1},
    "unavailable": {"status": 503, "kind": "server_error", "code": "unavailable", "retry_after_s": 5},
    "model": {"status": 500, "kind": "server_error"},
}


@dataclass(frozen=True)
class Failure:
    """Last item of an answer that is not complete.

    ``kind`` is ``request`` or ``too_long`` (the client's mistake), ``stale_image`` (images were resized for a model
    that has been replaced; asked again, the request fits), ``unavailable`` or ``model``.
    """

    message: str
    kind: FailureKind = "model"

    def error(self) -> ProtocolError:
        """As a refusal."""
        refusal = StaleImage if self.kind == "stale_image" else ProtocolError
        return refusal(message=self.message, **_FAILURES[self.kind])


class StaleImage(ProtocolError):
    """Images were resized for a model that has been replaced."""


Item = PromptRead | Piece | Failure
"""An answer is ``PromptRead``, then ``Piece`` after ``Piece``; a ``Failure`` may end it at any point."""


@dataclass(frozen=True)
class ReplicaStats:
    """Counters of one replica.

    Attributes:
        replica: its process id.
        node: name of its machine.
        values: by the names of ``metrics.ENGINE_COUNTERS`` and ``ENGINE_GAUGES``.
    """

    replica: str
    node: str
    values: dict[str, float]


class Backend(Protocol):
    """A model, near or far."""

    async def describe(self) -> ModelInfo:
        """Metadata of the model."""

    def stream(self, job: ChatJob) -> AsyncGenerator[Item, None]:
        """The answer as it grows; leaving the iterator early frees the model's slot."""

    async def complete(self, job: ChatJob) -> list[Item]:
        """The whole answer: the same items, text in one."""

    async def stats(self) -> list[ReplicaStats]:
        """Counters of each replica."""

    async def check_health(self) -> None:
        """Raises where no replica can answer."""
