"""Admission: how many requests are under way, and the refusal of those that are too many."""

from __future__ import annotations

import math

from pipelines.serving.protocol import ProtocolError


class Gate:
    """Counts admitted requests; one more than ``capacity`` is refused at once, with a guess when to come back."""

    def __init__(self, capacity: int, parallel: int) -> None:
        """Set the bounds.

        Args:
            capacity: requests that may be under way, waiting ones included.
            parallel: requests that are answered at the same time.
        """
        self.capacity, self.parallel = capacity, parallel
        self.in_flight = 0
        self._mean_seconds = 1.0

    def enter(self) -> None:
        """Admit one request.

        Raises:
            ProtocolError: 429, with the seconds after which there should be room.
        """
        if self.in_flight >= self.capacity:
            wait = self._mean_seconds * max(1, self.in_flight - self.parallel) / self.parallel
            raise ProtocolError(
                429,
                f"the server is answering {self.in_flight} requests and takes no more; try again soon.",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after_s=min(60, max(1, math.ceil(wait))),
            )
        self.in_flight += 1

    def leave(self, seconds: float) -> None:
        """One request is done, after so many seconds."""
        self.in_flight -= 1
        self._mean_seconds += 0.05 * (seconds - self._mean_seconds)
