"""OpenAI's chat completions as types: requests, with this model's few extensions.

Extensions are additional fields, which OpenAI's clients pass through: ``task``, ``box``, ``top_k``,
``min_p``, ``repetition_penalty``, ``ignore_eos`` and ``continue_final_message`` (answers: ``boxes``, see ``answers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipelines.serving.backend import SamplingFields

MAX_PARTS = 64
"""Content parts of one message."""

MAX_STOPS, MAX_STOP_LENGTH = 4, 128
"""Stop strings, and characters of each: the end of an answer is compared with them at every token."""

MAX_BIASES = 300
"""Entries of ``logit_bias``, OpenAI's bound."""

MAX_TOP_LOGPROBS = 20
"""Alternatives per token, OpenAI's bound."""

GREEDY_BELOW = 0.01
"""A lower temperature is greedy: it draws the most probable token anyway, and logits divided by it overflow."""

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "best_of": (1,),
    "typical_p": (1,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "echo": (False,),
    "chat_template": (),
    "prompt_logprobs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "json_schema": ({},),
    "grammar": ("",),
    "regex": ("",),
    "ebnf": ("",),
}
"""Fields of OpenAI, vLLM, SGLang and llama.cpp that would change the answer -> values that do not. Null never does.
Other unknown fields are ignored."""

TaskName = Literal["vqa", "caption", "refer", "identify", "grounding", "detection"]

Coordinates = tuple[float, float, float, float]


class TextPart(BaseModel):
    """Text."""

    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    """Where an image is: a ``data:`` URL, or http(s) where the server allows the host."""

    url: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    detail: str | None = Field(None, description="not used: the model has one resolution")


ImageSource = Annotated[ImageURL, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


class ImagePart(BaseModel):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageSource = Field(description="an object with url, or the URL itself")


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
TextParts = Annotated[list[TextPart], Field(max_length=MAX_PARTS)]
Parts = Annotated[list[Part], Field(max_length=MAX_PARTS)]


class SystemMessage(BaseModel):
    """Standing instructions; the model was trained without, so they are put before the first question."""

    role: Literal["system", "developer"]
    content: str | TextParts


class UserMessage(BaseModel):
    """A question, with or without images."""

    role: Literal["user"]
    content: str | Parts


class AssistantMessage(BaseModel):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | TextParts | None = None
    prefix: bool | None = Field(None, description="Mistral's and DeepSeek's word for continue_final_message")


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(BaseModel):
    """Options of a stream besides text."""

    include_usage: bool | None = False


class ResponseFormat(BaseModel):
    """The form of the answer: text. Boxes come as the message's ``boxes`` whatever the form."""

    type: Literal["text"]

    @field_validator("type", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        if value in ("json_object", "json_schema"):
            raise ValueError(
                f"{value} is not supported: this model writes text. Boxes come as numbers in message.boxes, "
                "without another format"
            )
        return value


class ChatRequest(BaseModel):
    """``POST /v1/chat/completions``."""

    CONVERSATION: ClassVar[str] = "messages"
    """Field that has the conversation."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="-1, as llama.cpp writes it, is none")
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens; wins over it")
    temperature: float | None = Field(None, ge=0, le=2, description=f"below {GREEDY_BELOW} the answer is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="0 keeps the most probable token alone")
    n: int | None = Field(None, ge=1, le=1, description="one answer per request")
    stop: str | list[str] | None = Field(
        None, description=f"up to {MAX_STOPS} strings of up to {MAX_STOP_LENGTH} characters"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        None, description=f"token id -> number in -100..100, up to {MAX_BIASES} entries"
    )
    response_format: ResponseFormat | None = None

    task: TaskName | None = Field(
        None, description="extension: word the last question as this task, without the turns before it"
    )
    box: Coordinates | None = Field(
        None, description="extension: x1, y1, x2, y2 in pixels of the last image, for task identify"
    )
    top_k: int | None = Field(None, ge=-1, description="extension: most probable tokens to draw from; 0 and -1 are all")
    min_p: float | None = Field(None, ge=0, le=1, description="extension: least share of the most probable token's")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="extension")
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="llama.cpp's name of repetition_penalty")
    ignore_eos: bool | None = Field(
        None, description="extension: write max_tokens tokens, past the end; for benchmarks"
    )

    continue_final_message: bool | None = Field(
        None, description="extension: continue the last message, the assistant's; else another answer follows it"
    )

    @model_validator(mode="after")
    def _nothing_that_would_change_the_answer(self) -> ChatRequest:
        refuse_unsupported(self.model_extra or {}, UNSUPPORTED)
        return self

    @field_validator("max_tokens", "max_completion_tokens", mode="before")
    @classmethod
    def _no_bound_is_none(cls, value: object) -> object:
        return None if value == -1 else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_usable(cls, value: object) -> object:
        strings = value if isinstance(value, list) else [] if value is None else [value]
        if len(strings) > MAX_STOPS or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in strings):
            raise ValueError(f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_is_usable(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_BIASES:
            raise ValueError(f"logit_bias takes up to {MAX_BIASES} entries, not {len(value)}")
        for token, bias in value.items():
            if not _is_token_id(token) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias maps token ids such as '11' to numbers in -100..100, not {token[:20]!r}")
        return value

    @property
    def continues(self) -> bool:
        """Whether the answer is the rest of the last message."""
        last = self.messages[-1]
        return bool(self.continue_final_message or (isinstance(last, AssistantMessage) and last.prefix))

    @property
    def ignored_fields(self) -> list[str]:
        """Names of fields that this server does not know, or takes and does not use."""
        return [name for name, value in (self.model_extra or {}).items() if value is not None]

    def sampling(self, max_tokens: int, temperature: float) -> SamplingFields:
        """How the answer is drawn.

        Args:
            max_tokens: where the request names none.
            temperature: the same.
        """
        wanted = temperature if self.temperature is None else self.temperature
        return {
            "max_tokens": self.max_completion_tokens or self.max_tokens or max_tokens,
            "temperature": 0.0 if wanted < GREEDY_BELOW else wanted,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or self.repeat_penalty or 1.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "ignore_end": bool(self.ignore_eos),
        }


def refuse_unsupported(fields: Mapping[str, object], unsupported: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse the first field that would change the answer.

    Args:
        fields: that a request brings and no type describes.
        unsupported: name -> values that do not change the answer.

    Raises:
        PydanticCustomError: of type ``unsupported``.
    """
    for name, value in fields.items():
        if name in unsupported and value is not None and not _is_one_of(value, unsupported[name]):
            if name == "tools" and fields.get("tool_choice") == "none":
                continue
            raise PydanticCustomError(
                "unsupported", "{field} is not supported by this server: leave it out", {"field": name}
            )


def _is_token_id(text: object) -> bool:
    """Whether a key is a token id in its one canonical form, so that no two keys name the same token."""
    return isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 10 and str(int(text)) == text


def _is_one_of(value: object, neutral: tuple[object, ...]) -> bool:
    """Equality that tells True from 1, but not 1.0."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in neutral)
