"""OpenAI's messages -> the turns that the model was trained on: user and assistant, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.serving.protocol import ChatRequest, ImagePart, ProtocolError
from tinygptv.data.conversation import ChatImage, ChatMessage, join_messages, task_instruction


@dataclass(frozen=True)
class Turns:
    """A request's messages, regrouped.

    Attributes:
        turns: user and assistant in turn; each image is its index in ``image_urls``.
        image_urls: pairs (field of the request, URL), in order.
    """

    turns: list[ChatMessage[int]]
    image_urls: list[tuple[str, str]]

    def messages(
        self, images: Sequence[ChatImage], task: str | None, box: tuple[float, float, float, float] | None
    ) -> tuple[ChatMessage[ChatImage], ...]:
        """Put the pictures in, and word the last question as its task.

        Raises:
            ProtocolError: 400: the task lacks words, a box or a picture.
        """
        messages = [ChatMessage(turn.role, turn.text, tuple(images[i] for i in turn.images)) for turn in self.turns]
        if box is not None and task != "identify":
            raise ProtocolError(400, "a box goes with task 'identify'.", param="box")
        if task is not None:
            if not images:
                raise ProtocolError(400, f"task {task!r} is about a picture, and the request has none.", param="task")
            last = messages[-1]
            try:
                size = (images[-1].width, images[-1].height)
                text = task_instruction(task, last.text, _ordered(box, size) if box else None, size)
            except ValueError as error:
                raise ProtocolError(400, str(error), param="task") from None
            messages[-1] = ChatMessage(last.role, text, last.images)
        return tuple(messages)


def read_turns(request: ChatRequest) -> Turns:
    """Regroup (``conversation.join_messages``).

    Raises:
        ProtocolError: 400: the conversation does not end with a question, or starts with an answer.
    """
    messages: list[ChatMessage[int]] = []
    image_urls: list[tuple[str, str]] = []
    for index, message in enumerate(request.messages):
        parts = message.content if isinstance(message.content, list) else []
        texts = [message.content] if isinstance(message.content, str) else []
        images: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, ImagePart):
                images.append(len(image_urls))
                image_urls.append((f"messages.{index}.content.{i}.image_url", part.image_url.url))
            else:
                texts.append(part.text)
        messages.append(ChatMessage(message.role, "\n".join(text for text in texts if text), tuple(images)))
    try:
        turns = join_messages(messages)
    except ValueError as error:
        raise ProtocolError(400, str(error), param="messages") from None
    if not turns or turns[-1].role != "user":
        raise ProtocolError(400, "the last message must be a question of the user.", param="messages")
    last = turns[-1]
    if request.task is None and not last.text and not last.images:
        raise ProtocolError(400, "the last message is empty.", param=f"messages.{len(request.messages) - 1}.content")
    return Turns(turns, image_urls)


def _ordered(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box with its corners in order, within the picture."""
    (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    width, height = size
    return (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
