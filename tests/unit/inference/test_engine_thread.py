"""The engine's thread and its two fronts."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from tests import virtual_time
from tests.serving_model import make_model, make_tokenizer
from tinygptv.inference import engine_thread
from tinygptv.inference.engine import Engine
from tinygptv.inference.engine_thread import EngineLoop, _Mailbox
from tinygptv.inference.request import Delta, Request
from tinygptv.inference.sampling import SamplingParams, TokenLogprobs
from tinygptv.inference.watch import ThreadFailure


def request(ids, **params):
    ids = np.asarray(ids, dtype=np.int64)
    embeds = make_model().get_input_embeddings()(torch.from_numpy(ids))
    return Request(ids, embeds, SamplingParams(ignore_end=True, **params))


@pytest.fixture
def loop():
    loop = EngineLoop(Engine(make_model(), make_tokenizer(), max_batch_size=4))
    yield loop
    loop.close()


@pytest.fixture
def steps(loop, monkeypatch):
    """Steps that the engine may make: twenty, so that a long answer has begun and is not finished, until more come."""
    permits, step = threading.Semaphore(20), loop.engine.step
    monkeypatch.setattr(loop.engine, "step", lambda: (permits.acquire(timeout=60), step())[1])
    yield permits
    permits.release(1000)


async def collect(stream):
    return [delta async for delta in stream]


def answer(loop, ids, **params):
    deltas = list(loop.iterate(request(ids, **params)))
    return "".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids]


def test_many_consumers_get_what_each_would_get_alone(loop):
    alone = {n: answer(loop, [n, 2, 3], max_tokens=20) for n in range(1, 13)}

    async def everybody():
        return await asyncio.gather(*(collect(loop.stream(request([n, 2, 3], max_tokens=20))) for n in range(1, 13)))

    for n, deltas in enumerate(asyncio.run(everybody()), 1):
        assert ("".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids]) == alone[n]
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("interval_s", [0.005, 0.05, float("inf")])
def test_an_interval_gathers_deltas_and_changes_nothing_else(loop, interval_s):
    wanted = answer(loop, [7, 8, 9], max_tokens=60)
    started = time.perf_counter()
    deltas = asyncio.run(collect(loop.stream(request([7, 8, 9], max_tokens=60), interval_s)))
    assert ("".join(d.text for d in deltas), [t for d in deltas for t in d.token_ids]) == wanted
    if interval_s == float("inf"):
        assert len(deltas) == 1
    else:
        assert len(deltas) <= 3 + (time.perf_counter() - started) / interval_s


def test_closing_wakes_a_thread_that_waits_for_work_and_waits_for_its_end(loop, monkeypatch):
    answer(loop, [7, 8], max_tokens=1)
    join, waited = loop.thread.join, []
    monkeypatch.setattr(loop.thread, "join", lambda timeout: waited.append(timeout) or join(min(timeout, 5)))
    loop.close()
    assert waited == [30] and not loop.thread.is_alive()


def test_a_thread_without_work_sleeps(loop):
    asleep = threading.Event()

    class News(threading.Event):
        def wait(self, timeout=None):
            asleep.set()
            return super().wait(timeout)

    before, loop._has_news = loop._has_news, News()
    before.set()
    assert asleep.wait(60)
    assert len(answer(loop, [7, 8], max_tokens=2)) == 2


def test_leaving_a_stream_frees_its_slot(loop, steps):
    async def leave():
        stream = loop.stream(request([1, 2], max_tokens=250))
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave())
    steps.release(1000)
    list(loop.iterate(request([3], max_tokens=1)))
    assert loop.engine.stats.cancelled == 1
    assert loop.engine.prefix_cache.num_free == 4


def test_a_cancelled_task_frees_its_slot(loop, steps):
    async def cancel():
        begun = asyncio.Event()

        async def consume():
            async for _ in loop.stream(request([1, 2], max_tokens=250)):
                begun.set()

        task = asyncio.create_task(consume())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    steps.release(1000)
    list(loop.iterate(request([3], max_tokens=1)))
    assert loop.engine.stats.cancelled == 1


def test_a_dead_event_loop_does_not_hurt_the_engine(loop, steps):
    async def walk_away():
        stream = loop.stream(request([1, 2], max_tokens=250))
        await anext(stream)
        walk_away.kept = stream  # never closed: as when a process's event loop is torn down

    event_loop = asyncio.new_event_loop()
    event_loop.run_until_complete(walk_away())
    event_loop.close()
    steps.release(1000)
    assert answer(loop, [5, 6], max_tokens=10)[1]
    assert loop.thread.is_alive() and loop.engine.stats.cancelled == 1, "nobody waits for the answer"


def test_leaving_an_iterator_frees_its_slot(loop, steps):
    deltas = loop.iterate(request([1, 2], max_tokens=250))
    next(deltas)
    deltas.close()
    steps.release(1000)
    list(loop.iterate(request([3], max_tokens=1)))
    assert loop.engine.stats.cancelled == 1 and loop.engine.prefix_cache.num_free == 4


def test_deltas_that_wait_become_one():
    woken = []
    mailbox = _Mailbox(lambda: woken.append(1))
    entries = [TokenLogprobs(token, -1.0) for token in (5, 6)]
    mailbox.put(Delta("a", [5], entries[:1], num_reused=9))
    mailbox.wake_on_any = False
    mailbox.put(Delta("b", [6], entries[1:]))
    assert len(woken) == 1, "between two pieces only the end wakes"
    mailbox.put(Delta("c", [7], finish_reason="error", error="why"))
    assert len(woken) == 2
    assert mailbox.take() == Delta("abc", [5, 6, 7], entries, "error", "why", 9)
    assert mailbox.take() is None


@pytest.fixture
def scripted():
    """A loop without a thread: the test puts the deltas into the mailboxes, and sees what is cancelled."""
    loop = object.__new__(EngineLoop)
    loop.boxes, loop.cancelled = [], []
    loop._submit = lambda request, mailbox: (loop.boxes.append(mailbox), lambda: loop.cancelled.append(request))[1]
    return loop


def test_an_iterator_sleeps_until_there_is_something(scripted, monkeypatch):
    class Asleep(Exception):
        pass

    class Event:
        def __init__(self):
            self.news, self.waits = False, 0

        def set(self):
            self.news = True

        def clear(self):
            self.news = False

        def wait(self):
            self.waits += 1
            assert self.waits < 9, "it asks again and again"
            if not self.news:
                raise Asleep

    monkeypatch.setattr(engine_thread.threading, "Event", Event)
    submit, deltas = scripted._submit, [Delta("a", [5]), Delta("b", [6])]

    def submit_with_news(request, mailbox):
        for delta in deltas:
            mailbox.put(delta)
        return submit(request, mailbox)

    scripted._submit = submit_with_news
    iterator = scripted.iterate("request")
    assert next(iterator) == Delta("ab", [5, 6]) and not scripted.cancelled
    with pytest.raises(Asleep):
        next(iterator)
    assert scripted.cancelled == ["request"]
    deltas[:] = [Delta("a", [5]), Delta("c", [7], finish_reason="stop")]
    iterator = scripted.iterate("other")
    assert next(iterator) == Delta("ac", [5, 7], finish_reason="stop")
    assert list(iterator) == [] and scripted.cancelled[1:] == ["other"]


async def begin(stream):
    """The next delta of a stream, as a task that waits for it."""
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.001)
    return task


def test_a_piece_that_comes_after_a_pause_is_given_at_once(scripted):
    async def consume():
        stream = scripted.stream("request", 0.002)
        first = await begin(stream)
        (box,) = scripted.boxes
        box.put(Delta("a"))
        assert (await first).text == "a"
        second = await begin(stream)
        await asyncio.sleep(0.01)
        assert not second.done(), "nothing has come"
        box.put(Delta("b"))
        assert (await asyncio.wait_for(second, 5)).text == "b"
        await stream.aclose()

    virtual_time.run(consume())
    assert scripted.cancelled == ["request"]


def test_pieces_that_come_in_a_pause_are_given_together_when_it_ends(scripted):
    async def consume():
        stream = scripted.stream("request", 0.02)
        first = await begin(stream)
        (box,) = scripted.boxes
        box.put(Delta("a"))
        assert (await first).text == "a"
        second = await begin(stream)
        for text in "bc":
            box.put(Delta(text))
        await asyncio.sleep(0.001)
        assert not second.done()
        assert (await asyncio.wait_for(second, 5)).text == "bc"
        last = await begin(stream)
        box.put(Delta("d", finish_reason="stop"))
        assert (await asyncio.wait_for(last, 5)).text == "d"
        assert [delta async for delta in stream] == []

    virtual_time.run(consume())
    assert scripted.cancelled == ["request"]


def test_the_end_is_not_held_back_by_a_pause(scripted):
    async def consume():
        stream = scripted.stream("request", 60.0)
        first = await begin(stream)
        (box,) = scripted.boxes
        box.put(Delta("a"))
        await first
        last = await begin(stream)
        box.put(Delta("b"))
        box.put(Delta("c", finish_reason="stop"))
        return (await asyncio.wait_for(last, 5)).text

    assert virtual_time.run(consume()) == "bc"


def test_a_request_that_comes_while_the_thread_ends_is_told(loop):
    loop.close()
    loop.thread.check_alive = lambda: None  # as if it ended right after
    (delta,) = loop.iterate(request([1, 2]))
    assert (delta.finish_reason, delta.error) == ("error", "the model was stopped while it answered.")


def test_what_cannot_be_answered_ends_with_an_error(loop):
    (delta,) = loop.iterate(request(range(1, 301)))
    assert delta.finish_reason == "error" and "300 tokens" in delta.error
    assert answer(loop, [5, 6], max_tokens=2)[1]


def test_a_request_that_cannot_be_added_does_not_end_the_thread(loop, monkeypatch):
    """Neither does telling so a consumer whose event loop is closed."""
    monkeypatch.setattr(loop.engine, "add", lambda request: 1 / 0)

    async def walk_away():
        monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", _closed)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(collect(loop.stream(request([1, 2]))), 0.1)

    def _closed(*_):
        raise RuntimeError("Event loop is closed")

    event_loop = asyncio.new_event_loop()
    event_loop.run_until_complete(walk_away())
    event_loop.close()
    monkeypatch.undo()
    assert answer(loop, [5, 6], max_tokens=2)[1]


@pytest.mark.parametrize(("error", "is_logged"), [(ValueError("too long"), False), (RuntimeError("a fault"), True)])
def test_a_clients_mistake_is_told_and_a_fault_is_logged_too(loop, monkeypatch, caplog, error, is_logged):
    def add(request):
        raise error

    monkeypatch.setattr(loop.engine, "add", add)
    (delta,) = loop.iterate(request([1, 2]))
    assert (delta.finish_reason, delta.error) == ("error", str(error))
    assert ("a request could not be added" in caplog.messages) is is_logged


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_tells_everybody_and_is_noticed(loop, monkeypatch):
    def broken():
        raise SystemExit

    monkeypatch.setattr(loop.engine, "step", broken)
    (delta,) = loop.iterate(request([1, 2]))
    assert delta.finish_reason == "error"
    loop.thread.join(60)
    with pytest.raises(ThreadFailure, match="engine thread has ended"):
        loop.thread.check(stuck_after_s=60)
    with pytest.raises(ThreadFailure):
        list(loop.iterate(request([1, 2])))


def test_a_step_that_takes_too_long_is_noticed(loop, monkeypatch):
    step, may_go_on = loop.engine.step, threading.Event()
    monkeypatch.setattr(loop.engine, "step", lambda: (may_go_on.wait(60), step())[1])
    consumer = threading.Thread(target=lambda: list(loop.iterate(request([1, 2], max_tokens=2))))
    consumer.start()
    while not loop.thread.busy_s:
        time.sleep(0.001)
    loop.thread.check(stuck_after_s=60)
    time.sleep(0.05)
    with pytest.raises(ThreadFailure, match="engine thread has been on one step"):
        loop.thread.check(stuck_after_s=0.02)
    may_go_on.set()
    consumer.join(60)
    assert loop.thread.busy_s == 0, "a thread that waits for work is not stuck"


def test_closing_ends_open_streams():
    loop = EngineLoop(Engine(make_model(), make_tokenizer(), max_batch_size=1))
    deltas = []
    consumer = threading.Thread(target=lambda: deltas.extend(loop.iterate(request([1], max_tokens=255))))
    consumer.start()
    while not deltas:
        time.sleep(0.001)
    loop.close()
    consumer.join(timeout=60)
    assert deltas[-1].finish_reason in ("error", "length")
    with pytest.raises(RuntimeError):
        list(loop.iterate(request([1])))
