"""Liveness of the threads that serve requests: is a thread alive, and how long has it been on its current work?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class WatchedThread(threading.Thread):
    """A daemon thread that says when it is working, so that others can tell that it died or is stuck."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        """Prepare the thread; ``start`` runs it.

        Args:
            target: called once, without arguments; wraps each unit of its work in ``working``.
            name: what error messages call the thread.
        """
        super().__init__(target=target, name=name, daemon=True)
        self._working_since: float | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """One bounded unit of work (a forward pass); waiting for work lies outside."""
        self._working_since = time.monotonic()
        try:
            yield
        finally:
            self._working_since = None

    @property
    def busy_s(self) -> float:
        """Seconds since the current unit of work began; 0 while the thread waits for work."""
        since = self._working_since
        return 0.0 if since is None else time.monotonic() - since

    def check_alive(self) -> None:
        """Check that the thread has not ended.

        Raises:
            ThreadFailure: it has.
        """
        if not self.is_alive():
            raise ThreadFailure(f"the {self.name} thread has ended.")

    def check(self, stuck_after_s: float) -> None:
        """Raise where the thread can serve nobody.

        Args:
            stuck_after_s: longest time of one unit of work, in seconds.

        Raises:
            ThreadFailure: the thread has ended, or its current work takes longer.
        """
        self.check_alive()
        if (busy_s := self.busy_s) > stuck_after_s:
            raise ThreadFailure(f"the {self.name} thread has been on one step for {busy_s:.0f} s.")


class ThreadFailure(RuntimeError):
    """A thread that serves requests has ended or is stuck; only a new process helps."""
