"""Admission: how many requests are in flight, in all and per client; more are refused at once with ``Retry-After``.

A client may take every slot while nobody else asks. Where the slots are taken, a client that has fewer than its share
of them is let in all the same, so that nobody can lock others out.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.serving.errors import server_stops, too_busy

OVERBOOKING = 2
"""Most requests in flight, as a multiple of the capacity, where clients below their share are let in."""


class Gate:
    """Counts admitted requests."""

    def __init__(
        self, capacity: int, parallel: int, per_client: int = 0, on_change: Callable[[int], object] = lambda _: None
    ) -> None:
        """Set the bounds.

        Args:
            capacity: requests in flight, waiting ones included.
            parallel: requests that are answered at the same time.
            per_client: requests in flight of one client; 0 is the capacity.
            on_change: called with the number of requests in flight whenever it changes.
        """
        self.capacity, self.parallel = capacity, parallel
        self.per_client = per_client or capacity
        self.on_change = on_change
        self.in_flight = 0
        self.is_closed = False
        """Whether nobody is let in any more: the server stops."""
        self._by_client: Counter[str] = Counter()
        self._mean_seconds = 1.0

    @contextmanager
    def admit(self, client: str) -> Iterator[None]:
        """Hold a slot while the block runs.

        Args:
            client: who asks.

        Raises:
            ProtocolError: 429, with the seconds after which there should be room; 503 where the gate is closed.
        """
        if self.is_closed:
            raise server_stops()
        if self.in_flight >= self.capacity and not self._is_below_share(client):
            raise too_busy(
                f"the server has {self.in_flight} requests in flight and takes no more; try again soon.", self.wait_s()
            )
        if self._by_client[client] >= self.per_client:
            raise too_busy(
                f"this client has {self._by_client[client]} requests in flight, the most that one client may have.",
                self.wait_s(),
            )
        started = time.monotonic()
        self._change(client, 1)
        try:
            yield
        finally:
            self._change(client, -1)
            self._mean_seconds += 0.05 * (time.monotonic() - started - self._mean_seconds)

    def _is_below_share(self, client: str) -> bool:
        """Whether a client has less than an equal share of the slots, and there is room to let it in."""
        num_clients = len(self._by_client) + (client not in self._by_client)
        has_less = self._by_client[client] < self.capacity // num_clients
        return has_less and self.in_flight < OVERBOOKING * self.capacity

    def wait_s(self) -> int:
        """Estimated seconds until a slot is free: the queue's length times the mean time of a request."""
        queued = max(1, self.in_flight - self.parallel)
        return math.ceil(self._mean_seconds * queued / self.parallel)

    def _change(self, client: str, by: int) -> None:
        self.in_flight += by
        self._by_client[client] += by
        if not self._by_client[client]:
            del self._by_client[client]
        self.on_change(self.in_flight)
