"""asyncio in virtual time: where nothing can run before the next timer, the clock jumps to it.

Sleeps and time limits last exactly as long as they say and cost nothing, however busy the machine is. Only for code
whose time is the event loop's: work in other threads takes no time, processes and sockets are waited for without one.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Lets time pass instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.in_threads = 1000.0, 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or self.in_threads:
            return super().select(None if timeout else timeout)
        ready = super().select(0)
        if not ready:
            self.now += max(timeout, 0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is its own."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(
        self, executor: Executor | None, function: Callable[..., T], *arguments: Any
    ) -> asyncio.Future[T]:
        self._virtual.in_threads += 1
        future = super().run_in_executor(executor, function, *arguments)
        future.add_done_callback(lambda _: setattr(self._virtual, "in_threads", self._virtual.in_threads - 1))
        return future


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(coroutine)
