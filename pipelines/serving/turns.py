"""OpenAI's messages -> the turns that the model was trained on: user and assistant, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.serving.protocol import ChatRequest, ImagePart, ProtocolError, SystemMessage, UserMessage
from tinygptv.data.conversation import ChatImage, ChatMessage, task_instruction


@dataclass
class _Turn:
    role: str
    texts: list[str] = field(default_factory=list)
    num_images: int = 0


@dataclass
class Turns:
    """A request's messages, regrouped.

    Attributes:
        image_urls: pairs (field of the request, URL), in order.
    """

    turns: list[_Turn]
    image_urls: list[tuple[str, str]]

    def messages(
        self, images: Sequence[ChatImage], task: str | None, box: tuple[float, float, float, float] | None
    ) -> tuple[ChatMessage, ...]:
        """Put the pictures in, and word the last question as its task.

        Raises:
            ProtocolError: 400: the task lacks words, a box or a picture.
        """
        remaining = list(images)
        messages = []
        for turn in self.turns:
            own, remaining = remaining[: turn.num_images], remaining[turn.num_images :]
            messages.append(ChatMessage(turn.role, "\n".join(text for text in turn.texts if text), tuple(own)))
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
    """Regroup: system messages go before the first question, neighbouring messages of one role become one.

    Raises:
        ProtocolError: 400: the conversation does not end with a question, or starts with an answer.
    """
    system: list[str] = []
    turns: list[_Turn] = []
    image_urls: list[tuple[str, str]] = []
    for index, message in enumerate(request.messages):
        parts = message.content if isinstance(message.content, list) else []
        texts = [message.content] if isinstance(message.content, str) else []
        texts += [part.text for part in parts if not isinstance(part, ImagePart)]
        if isinstance(message, SystemMessage):
            system += texts
            continue
        if not turns or turns[-1].role != message.role:
            turns.append(_Turn(message.role))
        turns[-1].texts += texts
        if isinstance(message, UserMessage):
            for i, part in enumerate(parts):
                if isinstance(part, ImagePart):
                    image_urls.append((f"messages.{index}.content.{i}.image_url", part.image_url.url))
                    turns[-1].num_images += 1
    if not turns or turns[-1].role != "user":
        raise ProtocolError(400, "the last message must be a question of the user.", param="messages")
    if turns[0].role != "user":
        raise ProtocolError(400, "the conversation must start with the user.", param="messages")
    turns[0].texts[:0] = system
    if request.task is None and not any(turns[-1].texts) and not turns[-1].num_images:
        raise ProtocolError(400, "the last message is empty.", param=f"messages.{len(request.messages) - 1}.content")
    return Turns(turns, image_urls)


def _ordered(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box with its corners in order, within the picture."""
    (x1, x2), (y1, y2) = sorted((box[0], box[2])), sorted((box[1], box[3]))
    width, height = size
    return (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
