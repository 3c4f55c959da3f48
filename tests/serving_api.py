"""Requests against the HTTP API without a socket, over a model that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from functools import cache

import httpx

from pipelines.serving.api import build_api
from pipelines.serving.backend import ModelInfo, Piece, PromptRead
from pipelines.serving.decoders import ImageDecoders
from pipelines.serving.metrics import Metrics
from pipelines.settings import ServeSettings
from tests import virtual_time
from tests.serving_model import data_url, make_image

IMAGE = {"type": "image_url", "image_url": {"url": data_url(make_image())}}
READ = PromptRead(3)
CHAT = "/v1/chat/completions"


@cache
def decoders() -> ImageDecoders:
    """One decoder process for all tests of this process."""
    return ImageDecoders(1)


def words(text):
    return {"type": "text", "text": text}


def ask(*content, **fields):
    return {"model": "tinygpt-v", "max_tokens": 12, "messages": [{"role": "user", "content": list(content)}], **fields}


def said(text, reason=None):
    return Piece(text, finish_reason=reason)


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else None for line in lines]


class FakeBackend:
    """A model that says what it is told to, and remembers what it was asked."""

    def __init__(self, *items, wait=0.0):
        self.items = items or (READ, said("fine", "stop"))
        self.wait, self.closed, self.jobs, self.healthy = wait, False, [], True

    async def describe(self):
        return ModelInfo(16, 100, 1, "drawn scenes")

    async def stream(self, job):
        self.jobs.append(job)
        try:
            for item in self.items:
                await asyncio.sleep(self.wait)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True

    async def complete(self, job):
        return [item async for item in self.stream(job)]

    async def stats(self):
        raise RuntimeError("no statistics")

    async def check_health(self):
        if not self.healthy:
            raise RuntimeError("the engine thread has ended.")


class Client:
    """Requests against the application, without a socket."""

    run = staticmethod(asyncio.run)
    prefix = ""
    """Ray Serve's ``route_prefix``."""

    def __init__(self, backend=None, **settings):
        self.backend = backend or FakeBackend()
        self.metrics = Metrics()
        self.app = build_api(ServeSettings(**settings), self.backend, self.metrics, decoders=decoders())

    def open(self, address=("127.0.0.1", 123)):
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=address, root_path=self.prefix)
        return httpx.AsyncClient(transport=transport, base_url="http://server")

    def request(self, method, path, **options):
        async def send():
            async with self.open() as client:
                return await client.request(method, path, **options)

        return self.run(send())

    def chat(self, body, **options):
        return self.request("POST", CHAT, json=body, **options)


class TimedClient(Client):
    """In virtual time: limits and waits last what they say, on the busiest machine too; no image can be decoded."""

    run = staticmethod(virtual_time.run)


def scope_of(path=CHAT, method="POST", headers=(), client=("127.0.0.1", 123)):
    """An ASGI scope, for tests that send the messages themselves."""
    return {
        "type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b"",
        "http_version": "1.1", "scheme": "http", "server": ("server", 80), "client": client, "root_path": "",
        "raw_path": path.encode(), "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
