"""Decoder processes: killed at their deadline, replaced when they die, never a reason for others to wait for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipelines.serving import decoders as processes
from pipelines.serving.decoder_process import DecodeError, DecodeJob, decode
from pipelines.serving.decoders import DecoderBusy, ImageDecoders
from tests.serving_model import data_url, make_image
from tinygptv.data.conversation import ChatImage
from tinygptv.data.data_url import DataURL

pytestmark = pytest.mark.security


def job(data=None, side=16, max_bytes=10**7, max_pixels=10**7):
    return DecodeJob(make_image() if data is None else data, side, max_bytes, max_pixels)


@pytest.fixture
def decoders():
    decoders = ImageDecoders(1)
    yield decoders
    decoders.close()


@pytest.fixture
def begun(monkeypatch):
    """Set once a process is given a job."""
    begun, original = threading.Event(), processes._DecoderProcess.decode
    monkeypatch.setattr(processes._DecoderProcess, "decode", lambda *given: (begun.set(), original(*given))[1])
    return begun


def run(decoders, one, wait_s=60.0, timeout_s=60.0):
    return asyncio.run(decoders.decode(one, wait_s=wait_s, timeout_s=timeout_s))


def pid_of(decoders):
    (process,) = [process for process in decoders._processes if process.is_alive]
    return process._process.pid


def test_a_process_decodes_as_this_one_does(decoders):
    for source in (make_image(3), DataURL.split(data_url(make_image(3)))):
        wanted, got = ChatImage.from_bytes(make_image(3), 24), run(decoders, job(source, side=24))
        assert (got.number, got.width, got.height) == (wanted.number, wanted.width, wanted.height)
        assert (got.pixels == wanted.pixels).all() and got.pixels.dtype == wanted.pixels.dtype
    assert run(decoders, job(b"nothing")) == decode(job(b"nothing"))


def test_bounds_are_exact():
    assert isinstance(decode(job(make_image(width=60, height=40), max_pixels=2400)), ChatImage)
    assert decode(job(make_image(width=60, height=40), max_pixels=2399)).code == "image_too_large"
    assert isinstance(decode(job(max_bytes=len(make_image()))), ChatImage)
    assert decode(job(max_bytes=len(make_image()) - 1)).code == "image_too_large"


def test_a_job_that_takes_too_long_is_killed_and_the_next_one_decoded(decoders):
    run(decoders, job())
    pid = pid_of(decoders)
    os.kill(pid, signal.SIGSTOP)  # as an image that never ends
    with pytest.raises(TimeoutError):
        run(decoders, job(), timeout_s=0.1)
    assert isinstance(run(decoders, job()), ChatImage)
    assert pid_of(decoders) != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_dies_costs_one_image(decoders, begun):
    run(decoders, job())
    begun.clear()
    os.kill(pid_of(decoders), signal.SIGSTOP)

    async def die_meanwhile():
        waiting = asyncio.create_task(decoders.decode(job(), wait_s=60, timeout_s=60))
        assert await asyncio.to_thread(begun.wait, 60)
        os.kill(pid_of(decoders), signal.SIGKILL)
        return await waiting

    assert asyncio.run(die_meanwhile()).code == "invalid_image"
    assert isinstance(run(decoders, job()), ChatImage)


def test_a_process_that_died_while_idle_costs_nothing(decoders):
    run(decoders, job())
    died = psutil.Process(pid_of(decoders))
    died.kill()
    while died.is_running() and died.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert isinstance(run(decoders, job()), ChatImage)


def test_waiting_for_a_decoder_has_an_end(decoders, begun):
    run(decoders, job())
    begun.clear()
    os.kill(pid_of(decoders), signal.SIGSTOP)

    async def crowd():
        slow = asyncio.create_task(decoders.decode(job(), wait_s=60, timeout_s=60))
        assert await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(DecoderBusy):
            await decoders.decode(job(), wait_s=0.05, timeout_s=60)
        os.kill(pid_of(decoders), signal.SIGKILL)
        assert (await slow).code == "invalid_image"
        return await decoders.decode(job(), wait_s=60, timeout_s=60)

    assert isinstance(asyncio.run(crowd()), ChatImage)


def test_one_image_does_not_wait_for_all_those_of_another_client(decoders):
    async def crowd():
        ends = []

        async def one(client):
            assert isinstance(await decoders.decode(job(), wait_s=60, timeout_s=60, client=client), ChatImage)
            ends.append(client)

        await asyncio.gather(*[one("many") for _ in range(9)], one("single"))
        return ends.index("single")

    assert asyncio.run(crowd()) == 2, "behind the one that was being decoded and one that waited"


def test_a_caller_that_leaves_hurts_nobody(decoders):
    async def leave_and_ask():
        leaving = [asyncio.create_task(decoders.decode(job(), wait_s=60, timeout_s=60)) for _ in range(5)]
        await asyncio.sleep(0.01)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        return await decoders.decode(job(), wait_s=60, timeout_s=60)

    assert isinstance(asyncio.run(leave_and_ask()), ChatImage)


def test_images_of_callers_that_left_before_their_turn_are_not_decoded(monkeypatch):
    decoders, decoded, released = ImageDecoders(1), [], threading.Event()
    monkeypatch.setattr(decoders, "_decode", lambda one, timeout_s: decoded.append(one) or released.wait(60))

    async def ask_and_leave():
        asked = [asyncio.create_task(decoders.decode(n, wait_s=60, timeout_s=60)) for n in range(3)]
        while not decoded:
            await asyncio.sleep(0.001)
        for task in asked[:2]:  # the second enters when the first, whose image is being decoded, has left
            task.cancel()
            await asyncio.sleep(0.01)
        released.set()
        await asked[2]

    asyncio.run(ask_and_leave())
    decoders.close()
    assert decoded == [0, 2]


def test_a_decoder_knows_no_secrets(decoders, monkeypatch):
    monkeypatch.setenv("TINYGPTV_API_KEYS", "secret-key")
    run(decoders, job())
    assert b"secret-key" not in Path(f"/proc/{pid_of(decoders)}/environ").read_bytes()


def test_memory_is_bounded(decoders):
    run(decoders, job())
    lines = Path(f"/proc/{pid_of(decoders)}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert limits["Max address space"] == "3000000000" and limits["Max file size"] == "0"


def test_an_answer_that_is_none_is_not_believed(decoders, monkeypatch):
    run(decoders, job())
    monkeypatch.setattr(processes, "receive_result", lambda *_: (_ for _ in ()).throw(ValueError("not JSON")))
    assert isinstance(run(decoders, job()), DecodeError)
    monkeypatch.undo()
    assert isinstance(run(decoders, job()), ChatImage)


def test_processes_end_with_their_server(decoders):
    run(decoders, job())
    pid = pid_of(decoders)
    decoders.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
