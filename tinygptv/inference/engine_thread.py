"""The engine on a thread of its own, with fronts for asyncio and for plain Python.

    async for delta in loop.stream(request): ...          # serving
    for delta in loop.iterate(request): ...               # command line

A consumer that falls behind gets several steps' text in one delta; it never slows the engine down.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator

from tinygptv.inference.engine import Engine
from tinygptv.inference.request import Delta, Request
from tinygptv.inference.watch import WatchedThread

logger = logging.getLogger(__name__)


class _Mailbox:
    """Deltas on their way from the engine's thread to one consumer."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self.deltas: deque[Delta] = deque()
        self.wake = wake
        self.wake_on_any = True

    def put(self, delta: Delta) -> None:
        """Engine's thread."""
        self.deltas.append(delta)
        if delta.finish_reason or self.wake_on_any:
            self.wake()

    def take(self) -> Delta | None:
        """Consumer: everything that has come, as one delta."""
        if not self.deltas:
            return None
        merged = self.deltas.popleft()
        while self.deltas:
            following = self.deltas.popleft()
            merged.text += following.text
            merged.token_ids += following.token_ids
            merged.logprobs += following.logprobs
            merged.finish_reason, merged.error = following.finish_reason, following.error
        return merged


class EngineLoop:
    """Runs an engine until ``close``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._mailboxes: dict[int, _Mailbox] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._has_news = threading.Event()
        self._closed = False
        self.thread = WatchedThread(self._run, "engine")
        self.thread.start()

    def close(self) -> None:
        """Stop the thread; what is still being answered ends as cancelled."""
        self._closed = True
        self._has_news.set()
        self.thread.join(timeout=30)

    async def stream(self, request: Request, interval_s: float = 0.0) -> AsyncGenerator[Delta, None]:
        """Answer a request; leaving the iterator early cancels it.

        Args:
            request: a prompt.
            interval_s: shortest time between two deltas, in seconds; the first and the last come at once. Infinity
                gives one delta, at the end.

        Yields:
            Deltas; the last one has a ``finish_reason``.
        """
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        mailbox = _Mailbox(lambda: loop.call_soon_threadsafe(news.set))
        mailbox.wake_on_any = interval_s != float("inf")
        cancel = self._submit(request, mailbox)
        try:
            while True:
                await news.wait()
                news.clear()
                delta = mailbox.take()
                if delta is None:
                    continue
                if interval_s and not delta.finish_reason:
                    mailbox.wake_on_any = False  # from here to the end of the pause, only the last delta wakes us
                yield delta
                if delta.finish_reason:
                    return
                if 0 < interval_s < float("inf"):
                    await _pause(news, interval_s)
                    mailbox.wake_on_any = True
                    if mailbox.deltas:
                        news.set()
        finally:
            cancel()

    def iterate(self, request: Request) -> Iterator[Delta]:
        """The same for code without asyncio."""
        news = threading.Event()
        mailbox = _Mailbox(news.set)
        cancel = self._submit(request, mailbox)
        try:
            while True:
                news.wait()
                news.clear()
                delta = mailbox.take()
                if delta is None:
                    continue
                yield delta
                if delta.finish_reason:
                    return
        finally:
            cancel()

    # ------------------------------------------------------------------ between the threads

    def _submit(self, request: Request, mailbox: _Mailbox) -> Callable[[], None]:
        """Hand a request over; returns the function that cancels it.

        Raises:
            ThreadFailure: the engine has stopped.
        """
        self.thread.check_alive()
        request_ids: list[int] = []

        def add() -> None:
            try:
                request_ids.append(self.engine.add(request))
            except Exception as error:  # whatever is wrong with one request, the thread continues
                if not isinstance(error, ValueError):
                    logger.exception("a request could not be added")
                _put(mailbox, Delta(finish_reason="error", error=str(error)))
            else:
                self._mailboxes[request_ids[0]] = mailbox

        def cancel() -> None:
            if request_ids:
                self.engine.cancel(request_ids[0])

        self._post(add)
        if self._closed:  # the thread may have emptied its inbox before this request came
            _put(mailbox, _stopped())
        return lambda: self._post(cancel)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._has_news.set()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._has_news.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if not self.engine.has_work:
                    self._has_news.wait()
                    continue
                with self.thread.working():
                    results = self.engine.step()
                self._deliver(results)
        finally:
            self._closed = True
            while self._inbox:
                self._inbox.popleft()()
            for mailbox in self._mailboxes.values():
                _put(mailbox, _stopped())
            self._mailboxes.clear()

    def _deliver(self, results: list[tuple[int, Delta]]) -> None:
        for request_id, delta in results:
            mailbox = self._mailboxes.pop(request_id) if delta.finish_reason else self._mailboxes[request_id]
            if not _put(mailbox, delta):
                self.engine.cancel(request_id)


def _stopped() -> Delta:
    return Delta(finish_reason="error", error="the model was stopped while it answered.")


def _put(mailbox: _Mailbox, delta: Delta) -> bool:
    """Deliver; False where the consumer's event loop is closed, so that nobody waits for this answer."""
    try:
        mailbox.put(delta)
    except RuntimeError:
        return False
    return True


async def _pause(news: asyncio.Event, seconds: float) -> None:
    """Sleep, unless woken."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(news.wait(), seconds)
