"""OpenAI's messages -> the turns that the model was trained on: user and assistant, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipelines.serving.errors import ProtocolError
from pipelines.serving.protocol import ChatRequest, ImagePart, TaskName
from tinygptv.data.conversation import ChatImage, ChatMessage, join_messages, task_instruction, task_of


class ImageReference(NamedTuple):
    """An image of a request: the field that has it, and its URL."""

    param: str
    url: str


@dataclass(frozen=True)
class Turns:
    """A request's messages, regrouped.

    Attributes:
        turns: user and assistant in turn, the assistant last where its answer is to be continued; each image is its
            index in ``images``.
        images: in order.
    """

    turns: list[ChatMessage[int]]
    images: list[ImageReference]

    @property
    def _at(self) -> int:
        """Number of the last question: the last turn, or the one before an answer that is to be continued."""
        return len(self.turns) - 1 - (self.turns[-1].role == "assistant")

    def with_default_task(self, request: ChatRequest, default: TaskName | Literal[""]) -> ChatRequest:
        """The request, worded as the server's task where it is about an image and names no task."""
        text = self.turns[self._at].text
        is_wordless = not text and default not in ("caption", "grounding")
        if not default or request.task is not None or not self.images or is_wordless or task_of(text) is not None:
            return request
        return request.model_copy(update={"task": default})

    def messages(self, images: Sequence[ChatImage], request: ChatRequest) -> tuple[ChatMessage[ChatImage], ...]:
        """Put the images in, and word the last question as its task.

        A task, whether the request's field or a tag in the text, goes without the turns before it: no checkpoint was
        trained on conversations about tasks. Its images are the question's own, else the last one of the request.

        Args:
            images: decoded, one per reference.
            request: what ``read_turns`` read.

        Raises:
            ProtocolError: 400: the task lacks words, a box or an image, or the box lies outside of the image.
        """
        messages = [ChatMessage(turn.role, turn.text, tuple(images[i] for i in turn.images)) for turn in self.turns]
        if request.box is not None and request.task != "identify":
            raise ProtocolError(400, "a box goes with task 'identify'.", param="box")
        text = messages[self._at].text
        if request.task is not None:
            text = _instruction(request, text, images)
        if task_of(text) is None:
            return tuple(messages)
        question = ChatMessage("user", text, messages[self._at].images or tuple(images[-1:]))
        return (question, *messages[self._at + 1 :])


def _instruction(request: ChatRequest, text: str, images: Sequence[ChatImage]) -> str:
    """The last question, worded as the request's task."""
    if not images:
        raise ProtocolError(400, f"task {request.task!r} is about an image: the request has none.", param="task")
    try:
        return task_instruction(str(request.task), text, request.box, (images[-1].width, images[-1].height))
    except ValueError as error:
        param = "task" if request.box is None else "box"
        raise ProtocolError(400, str(error), param=param, code="invalid_value") from None


def read_turns(request: ChatRequest) -> Turns:
    """Regroup (``conversation.join_messages``).

    After a last message of the assistant another one is asked for by an empty question, as OpenAI and vLLM do, unless
    the request continues it; an empty one stands for the answer to be written.

    Raises:
        ProtocolError: 400: the last message is empty, or is not the one to be continued.
    """
    messages: list[ChatMessage[int]] = []
    images: list[ImageReference] = []
    for index, message in enumerate(request.messages):
        parts = message.content if isinstance(message.content, list) else []
        texts = [message.content] if isinstance(message.content, str) else []
        own: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, ImagePart):
                own.append(len(images))
                images.append(ImageReference(f"messages.{index}.content.{i}.image_url", part.image_url.url))
            else:
                texts.append(part.text)
        messages.append(ChatMessage(message.role, "\n".join(text for text in texts if text), tuple(own)))
    try:
        turns = join_messages(messages)
    except ValueError as error:
        raise ProtocolError(400, str(error), param="messages") from None
    if request.continues and turns[-1].role != "assistant":
        told = "the last message must be the assistant's, which is to be continued."
        raise ProtocolError(400, told, param="continue_final_message")
    if turns[-1].role == "assistant" and not turns[-1].text:
        turns.pop()
    last = turns[-1]
    if request.task is None and not last.text and not last.images:
        raise ProtocolError(400, "the last message is empty.", param=f"messages.{len(request.messages) - 1}.content")
    if last.role == "assistant" and not request.continues:
        turns.append(ChatMessage("user", ""))
    return Turns(turns, images)
