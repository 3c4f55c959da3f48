"""Message dictionaries of transformers and of OpenAI -> ``ChatMessage``, and the images that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from tinygptv.data.conversation import ChatMessage
from tinygptv.data.images import load_image

_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def read_messages(conversation: Sequence[Mapping[str, Any]]) -> list[ChatMessage[Any]]:
    """Read one conversation.

    Args:
        conversation: ``{"role": .., "content": ..}``; content is text, or a list of ``{"type": "text", "text": ..}``
            and ``{"type": "image"}`` parts. An image part names its image by ``image``, ``path``, ``url`` or
            ``base64``, or leaves it to be given apart; OpenAI's ``image_url`` parts are read too.

    Returns:
        One message each; an image is what the part names (see ``images.load_image``), or None.

    Raises:
        ValueError: a message or part is of another form.
    """
    if not conversation:
        raise ValueError("the conversation has no messages.")
    return [_read_message(index, message) for index, message in enumerate(conversation)]


def _read_message(index: int, message: Any) -> ChatMessage[Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f'message {index} is {message!r:.80}: a message is {{"role": ..., "content": ...}}.')
    content = message.get("content") or []
    texts: list[str] = [content] if isinstance(content, str) else []
    images: list[Any] = []
    for part in () if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images.append(_image_source(part))
        else:
            raise ValueError(
                f'message {index} has the part {part!r:.80}: a part is {{"type": "text", "text": ...}} or '
                '{"type": "image", "image": ...}, with path or url instead of image.'
            )
    return ChatMessage(message["role"], "\n".join(text for text in texts if text), tuple(images))


def _image_source(part: Mapping[str, Any]) -> Any:
    source = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
    return source.get("url") if isinstance(source, Mapping) else source


def load_images(messages: Sequence[ChatMessage[Any]], given: Sequence[Any] = ()) -> list[Image.Image]:
    """Load the images of a conversation, in order.

    Args:
        messages: from ``read_messages``.
        given: images for the parts that name none.

    Raises:
        ValueError: an image cannot be loaded, or too few or too many were given.
    """
    sources = [image for message in messages for image in message.images]
    missing = sum(source is None for source in sources)
    if missing != len(given):
        raise ValueError(
            f"{missing} image parts name no image and {len(given)} images were given: put each into its part as "
            '{"type": "image", "image": ...}, or give one for each such part.'
        )
    waiting = iter(given)
    return [load_image(next(waiting) if source is None else source) for source in sources]
