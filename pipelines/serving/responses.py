"""Requests of OpenAI's Responses API, the part that stores nothing, as types: another way to write a chat request.

``POST /v1/responses`` becomes a ``ChatRequest``, which is admitted, checked and answered as any other; its answer is
in ``response_answers``.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from pipelines.serving.protocol import MAX_PARTS, ChatRequest, ImageSource, ResponseFormat, refuse_unsupported

STORED: dict[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
}
"""Fields that need a server which stores something -> values that do not. Null never does."""

WITH_LOGPROBS = "message.output_text.logprobs"


class InputText(BaseModel):
    """Text."""

    type: Literal["input_text", "output_text"]
    text: str

    def to_chat(self) -> dict[str, object]:
        """The part of a chat's message."""
        return {"type": "text", "text": self.text}


class InputImage(BaseModel):
    """An image."""

    type: Literal["input_image"]
    file_id: None = Field(None, description="not supported: no file is stored")
    image_url: ImageSource = Field(description="a data: URL, or http(s) where the server allows the host")
    detail: str | None = Field(None, description="not used: the model has one resolution")

    @field_validator("file_id", mode="before")
    @classmethod
    def _no_file(cls, value: object) -> None:
        if value is not None:
            raise ValueError("no file is stored here: send the image itself as image_url")

    def to_chat(self) -> dict[str, object]:
        """The part of a chat's message."""
        return {"type": "image_url", "image_url": {"url": self.image_url.url}}


class UserInput(BaseModel):
    """A question, with or without images."""

    type: Literal["message"] | None = None
    role: Literal["user"]
    content: (
        str
        | Annotated[list[Annotated[InputText | InputImage, Field(discriminator="type")]], Field(max_length=MAX_PARTS)]
    )


class OtherInput(BaseModel):
    """Standing instructions, or an earlier answer, as it came or in short."""

    type: Literal["message"] | None = None
    role: Literal["assistant", "system", "developer"]
    content: str | Annotated[list[InputText], Field(max_length=MAX_PARTS)]


def _only_messages(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "message"):
        told = f"an item of type {str(kind)[:40]!r} is not supported"
        raise ValueError(f"{told}: this server takes messages, and stores none")
    return value


InputItem = Annotated[UserInput | OtherInput, Field(discriminator="role"), BeforeValidator(_only_messages)]


class TextOptions(BaseModel):
    """The form of the answer."""

    format: ResponseFormat | None = None


class ResponsesRequest(BaseModel):
    """``POST /v1/responses``; other fields mean what they mean in a chat request."""

    CONVERSATION: ClassVar[str] = "input"
    """Field that has the conversation."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[InputItem] = Field(min_length=1)
    instructions: str | None = Field(None, description="as a system message before the input")
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    include: list[str] | None = Field(None, description=f"{WITH_LOGPROBS} gives log-probabilities")
    metadata: dict[str, str] | None = Field(None, description="comes back in the answer")
    user: str | None = Field(None, description="comes back in the answer")
    store: bool | None = Field(None, description="not used: nothing is stored")
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="not used: a conversation that does not fit is refused"
    )

    _chat: ChatRequest = PrivateAttr()

    @model_validator(mode="after")
    def _is_a_chat_request(self) -> ResponsesRequest:
        options: dict[str, object] = dict(self.model_extra or {})
        refuse_unsupported(options, STORED)
        messages: list[dict[str, object]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in [UserInput(role="user", content=self.input)] if isinstance(self.input, str) else self.input:
            content = item.content if isinstance(item.content, str) else [part.to_chat() for part in item.content]
            messages.append({"role": item.role, "content": content})
        if self.max_output_tokens is not None:
            options["max_completion_tokens"] = self.max_output_tokens
        if WITH_LOGPROBS in (self.include or ()):
            options["logprobs"] = True
        self._chat = ChatRequest.model_validate({**options, "model": self.model, "messages": messages})
        return self

    @property
    def chat(self) -> ChatRequest:
        """The same request to ``POST /v1/chat/completions``."""
        return self._chat

    @property
    def ignored_fields(self) -> list[str]:
        """Names of fields that this server does not know, or takes and does not use."""
        return self._chat.ignored_fields

    def field_of(self, param: str | None) -> str | None:
        """Where this request has a field of its chat request.

        Args:
            param: e.g. ``messages.1.content.0.image_url``.
        """
        found = re.fullmatch(r"messages(?:\.(\d+)(.*))?", param or "")
        if not found:
            return param
        index = int(found[1] or 0) - (self.instructions is not None)
        if found[1] is None or isinstance(self.input, str):
            return "input" if index >= 0 or found[1] is None else "instructions"
        return f"input.{index}{found[2]}" if index >= 0 else "instructions"
