"""A stand-in for the assistant that the chat command asks, and the command's options."""

from __future__ import annotations

from types import SimpleNamespace

from tinygptv import chat
from tinygptv.inference.request import Delta
from tinygptv.inference.sampling import SamplingParams


class NotingAssistant:
    """Answers with its texts in turn, or by the image's bytes where one text is a ``dict``; notes what it is asked."""

    max_batch_size = 2

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def open(self, data):
        if data == b"broken":
            raise ValueError("it is no image.")
        return SimpleNamespace(width=200, height=100, data=data)

    def answer(self, messages, params):
        self.asked.append((messages, params))
        text = self.texts[0][messages[0].images[0].data] if isinstance(self.texts[0], dict) else self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        return text

    def iterate(self, messages, params):
        self.asked.append((list(messages), params))
        text = self.texts.pop(0)
        yield Delta(text[:2])
        yield Delta(text[2:], finish_reason="stop")


PARAMS = SamplingParams(max_tokens=3)


def options(*words):
    return chat._parse(list(words), "chat")
