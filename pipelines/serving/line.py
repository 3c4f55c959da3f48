"""Who is next: admitted requests wait here for a decoder or the model, and clients are called in turn.

The gate decides who is let in. Without a line, all requests of a client that sends many at once would be answered
before the one request of a client that comes after it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

AT_MODEL = 2
"""Requests at a replica for each that it answers at a time: enough that the next one's prompt and images are ready."""


class Line:
    """A number of places; of the clients that wait, each is given one place before any is given two."""

    def __init__(self, places: int) -> None:
        """Set how many there are."""
        self.places = self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Event]] = OrderedDict()

    async def enter(self, client: str) -> None:
        """Wait for a place; ``leave`` gives it back.

        Args:
            client: who asks.
        """
        if self._free:
            self._free -= 1
            return
        called = asyncio.Event()
        self._waiting.setdefault(client, deque()).append(called)
        try:
            await called.wait()
        except asyncio.CancelledError:
            if called.is_set():  # at the moment at which it left
                self.leave()
            else:
                self._forget(client, called)
            raise

    def leave(self) -> None:
        """Give the place to the client whose turn it is."""
        if not self._waiting:
            self._free += 1
            return
        client, calls = self._waiting.popitem(last=False)
        calls.popleft().set()
        if calls:
            self._waiting[client] = calls  # behind the others

    def _forget(self, client: str, called: asyncio.Event) -> None:
        calls = self._waiting[client]
        calls.remove(called)
        if not calls:
            del self._waiting[client]
