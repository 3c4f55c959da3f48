"""The line for the model: clients are called in turn, and a place is never lost."""

from __future__ import annotations

import asyncio

import pytest

from pipelines.serving.line import Line
from tests import virtual_time

pytestmark = pytest.mark.security


class Queue:
    """Requests that wait in a line, named by their clients; ``called`` has them in the order of their calls."""

    def __init__(self, places):
        self.line, self.called = Line(places), []

    async def wait(self, *names):
        tasks = [asyncio.create_task(self._enter(name)) for name in names]
        await asyncio.sleep(0)
        return tasks

    async def _enter(self, name):
        await self.line.enter(name[0])
        self.called.append(name)

    async def leave(self, times=1):
        for _ in range(times):
            self.line.leave()
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("waiting", "order"),
    [
        (["a1", "a2", "a3", "a4", "b1"], ["a1", "b1", "a2", "a3", "a4"]),
        (["a1", "a2", "b1", "c1", "b2", "c2"], ["a1", "b1", "c1", "a2", "b2", "c2"]),
        (["a1", "a2", "a3"], ["a1", "a2", "a3"]),
    ],
)
def test_clients_are_called_in_turn_and_each_ones_requests_as_they_came(waiting, order):
    async def run():
        queue = Queue(2)
        await queue.wait("x1", "x2")
        assert queue.called == ["x1", "x2"]
        await queue.wait(*waiting)
        assert len(queue.called) == 2, "there is no place"
        await queue.leave(len(waiting))
        assert queue.called[2:] == order
        await queue.leave(2)
        await queue.wait("y1", "y2")
        assert queue.called[-2:] == ["y1", "y2"], "places are free again"
        await queue.wait("y3")
        assert queue.called[-1] == "y2", "and there are as many as before"

    virtual_time.run(run())


def test_a_client_that_comes_back_is_behind_those_that_wait():
    async def run():
        queue = Queue(1)
        await queue.wait("x1", "a1", "a2", "b1")
        await queue.leave()
        await queue.wait("c1", "a3")
        await queue.leave(5)
        assert queue.called == ["x1", "a1", "b1", "a2", "c1", "a3"]

    virtual_time.run(run())


@pytest.mark.parametrize("is_called", [False, True])
def test_who_leaves_the_line_takes_no_place_with_it(is_called):
    async def run():
        queue = Queue(1)
        tasks = await queue.wait("x1", "a1", "b1")
        if is_called:  # and cancelled, before it has run
            queue.line.leave()
        tasks[1].cancel()
        await asyncio.sleep(0)
        if not is_called:
            queue.line.leave()
        await asyncio.wait(tasks)
        assert queue.called == ["x1", "b1"] and tasks[1].cancelled()
        await queue.leave()
        await queue.wait("c1", "c2")
        assert queue.called == ["x1", "b1", "c1"]

    virtual_time.run(run())


def test_a_client_is_called_at_the_moment_at_which_it_leaves():
    async def run():
        queue = Queue(1)
        tasks = await queue.wait("x1", "a1", "b1")
        tasks[1].cancel()
        queue.line.leave()  # before its task has noticed
        await asyncio.wait(tasks)
        assert queue.called == ["x1", "b1"]

    virtual_time.run(run())
