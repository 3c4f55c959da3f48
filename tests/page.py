"""Helpers of the tests of the web page: a model that says what it is told to, behind the real API, in a browser."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time

import uvicorn

from pipelines.serving.api import build_api
from pipelines.serving.backend import Failure, ModelInfo, Piece, PromptRead
from pipelines.settings import ServeSettings
from tests.serving_model import make_image

WIDTH, HEIGHT = 300, 200
PATIENCE_MS = 120_000
"""How long the browser is waited for; what a busy machine takes fails no test."""
GROUNDED = "<p>a dog</p> {<10><20><50><60>} and <p>two cats</p> {<60><0><100><50>}<delim>{<0><70><20><100>}."


class ScriptedModel:
    """Answers with ``text``, four characters at a time (one permit each, where there are any); remembers its jobs."""

    def __init__(self):
        self.text, self.jobs, self.closed, self.pause_s, self.error = "hello", [], 0, 0.01, None
        self.scope, self.healthy, self.most_messages = "drawn scenes", True, 99
        self.reason, self.prompt_tokens, self.permits = "stop", 5, None

    async def describe(self):
        return ModelInfo(16, 500, 1, self.scope)

    async def stream(self, job):
        self.jobs.append(job)
        try:
            if self.error:
                error, self.error = self.error, None
                yield error
                return
            if len(job.messages) > self.most_messages:
                yield Failure("the prompt has 549 tokens but the context is 500.", "too_long")
                return
            yield PromptRead(self.prompt_tokens)
            for start in range(0, len(self.text), 4):
                await asyncio.sleep(self.pause_s)
                while self.permits and not self.permits.acquire(blocking=False):
                    await asyncio.sleep(0.01)
                last = start + 4 >= len(self.text)
                yield Piece(self.text[start : start + 4], finish_reason=self.reason if last else None)
        finally:
            self.closed += 1

    async def complete(self, job):
        return [item async for item in self.stream(job)]

    async def stats(self):
        return []

    async def check_health(self):
        if not self.healthy:
            raise RuntimeError("stuck")


class Server:
    def __init__(self, **settings):
        self.model = ScriptedModel()
        app = build_api(ServeSettings(**settings), self.model)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

    def cut_connections(self):
        """As a network that fails does, or a server that is killed."""
        for connection in list(self.server.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)


def expect(locator):
    """playwright's assertions, which wait; imported late, because a machine without a browser may lack playwright."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    return expect(locator)


def new_context(browser, **options):
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
    context.set_default_timeout(PATIENCE_MS)
    return context


def open_page(browser, server, **options):
    context = new_context(browser, **options)
    page = context.new_page()
    problems, addresses = [], []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#status[data-state=ready]")
    page.problems = problems
    yield page
    context.close()
    assert [text for text in problems if "status of" not in text] == []
    own = (server.url, "data:", "blob:")
    assert [url for url in addresses if not url.startswith(own)] == [], "the page loads nothing from elsewhere"


def upload(page, width=WIDTH, height=HEIGHT):
    data = make_image(width=width, height=height)
    page.set_input_files("#file", {"name": "dog.png", "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("#stage:not([hidden])")
    return data


def upload_image(page, image, kind, called=""):
    """Choose a PIL image, written in a format, perhaps called another one."""
    file = io.BytesIO()
    image.save(file, kind)
    page.set_input_files(
        "#file", {"name": "dog", "mimeType": f"image/{(called or kind).lower()}", "buffer": file.getvalue()}
    )
    page.wait_for_selector("#stage:not([hidden])")


def ask(page, text, task=""):
    page.check(f'input[name=task][value="{task}"]', force=True)
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_for_answer(page, number=1):
    # Not wait_for_function: the page's own policy forbids evaluating strings, and stays in force here.
    expect(page.locator(".message.assistant footer")).to_have_count(number)
    return page.locator(".message.assistant > span").nth(number - 1).inner_text()
