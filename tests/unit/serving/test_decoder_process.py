"""What a decoder says of an image and how it is sent, without a process; and what a driver does with one that fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
import threading
from collections import Counter
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.serving import decoder_process, decoders
from pipelines.serving.decoder_process import (
    READY,
    DecodeError,
    DecodeJob,
    decode,
    main,
    receive_result,
    send_result,
    too_many_bytes,
)
from tests.serving_model import data_url, make_image
from tinygptv.data.conversation import ChatImage
from tinygptv.data.data_url import DataURL

pytestmark = pytest.mark.security


def job(source, side=16, max_bytes=10**7, max_pixels=10**7):
    return DecodeJob(source, side, max_bytes, max_pixels)


def told(source, **bounds):
    return tuple(decode(job(source, **bounds)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_usual_formats_are_decoded_and_no_others(kind):
    data, other = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 60)).save(data, kind)
    found = decode(job(data.getvalue()))
    assert (found.width, found.height, found.pixels.shape) == (30, 20, (3, 16, 16))
    assert np.abs(found.pixels.mean((1, 2)) - (200, 10, 60)).max() < 12
    Image.new("RGB", (30, 20)).save(other, "TIFF" if kind == "GIF" else "PPM")
    assert decode(job(other.getvalue())).code == "invalid_image"


def test_each_refusal_names_its_bound_or_what_is_wrong():
    image = make_image(width=60, height=40)
    assert told(DataURL("", True, "####"))[0] == "invalid_base64"
    assert told(DataURL("", True, "####"))[1].startswith("the data URL cannot be read: it is not valid base64 (")
    assert told(bytes(2_345_678), max_bytes=1_250_000) == (
        "image_too_large",
        "the image has 2.3 MB; this server takes 1.25 MB.",
    )
    assert told(image, max_pixels=2_399) == (
        "image_too_large",
        "the image has 60 x 40 pixels; this server takes 0.002399 megapixels.",
    )
    assert decode(job(image, max_bytes=len(image), max_pixels=2400)).width == 60, "at the bounds"
    unreadable = ("invalid_image", "the image is not readable as JPEG, PNG, WebP, GIF or BMP.")
    assert told(b"nothing") == unreadable
    tiff = io.BytesIO()
    Image.new("RGB", (4, 4)).save(tiff, "TIFF")
    assert told(tiff.getvalue()) == unreadable


def test_a_damaged_image_and_a_bomb_say_which_they_are(monkeypatch):
    monkeypatch.setattr(ChatImage, "from_bytes", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    damaged = "the image is a damaged PNG: its 60 x 40 pixels cannot be decoded."
    assert told(make_image(width=60, height=40)) == ("invalid_image", damaged)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    bomb = "the image has hundreds of megapixels; this server takes 10 megapixels."
    assert told(make_image(width=60, height=40)) == ("image_too_large", bomb)


def test_what_is_wrong_with_a_files_structure_is_told_as_it_is(monkeypatch):
    def refuse(data):
        raise ValueError(f"{len(data)} bytes of frames.")

    assert decode(job(make_image(width=1, height=1))).width == 1, "the smallest image"
    monkeypatch.setattr(Image, "open", lambda *_, **__: SimpleNamespace(size=(0, 5), format="GIF"))
    nothing = "the image has 0 x 5 pixels; this server takes 10 megapixels."
    assert told(make_image()) == ("image_too_large", nothing)
    monkeypatch.setattr(decoder_process, "check_structure", refuse)
    assert told(b"abc") == ("invalid_image", "3 bytes of frames.")


def test_a_data_url_is_decoded_as_its_bytes_are():
    image = make_image(3)
    same = [decode(job(source, side=24)) for source in (image, DataURL.split(data_url(image)))]
    assert (same[0].pixels == same[1].pixels).all() and same[0].number == same[1].number
    assert same[0].pixels.shape == (3, 24, 24) and (same[0].width, same[0].height) == (60, 40)


@pytest.mark.parametrize(("size", "text"), [(1_049_999, "1.0"), (1_050_001, "1.1"), (999, "0.0")])
def test_megabytes_are_rounded(size, text):
    assert too_many_bytes(size, 500_000) == f"the image has {text} MB; this server takes 0.5 MB."


def sent(result, side=16):
    ours, theirs = Pipe()
    with ours, theirs:
        send_result(theirs, result)
        return receive_result(ours, side)


def test_an_image_and_an_error_arrive_as_they_were_sent():
    image = ChatImage(-7, np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8), 60, 40)
    found = sent(image)
    assert (found.number, found.width, found.height) == (-7, 60, 40)
    assert (found.pixels == image.pixels).all() and found.pixels.dtype == np.uint8
    assert sent(DecodeError("code", "message")) == DecodeError("code", "message")


@pytest.mark.parametrize(
    "messages",
    [
        [b"[]" + b" " * 10_000],
        [b"{"],
        [b'{"number": 1, "width": 1, "height": 1}', bytes(769)],
        [b'{"number": 1, "width": 1, "height": 1}', bytes(767)],
        [b'{"number": 1, "width": "x", "height": 1}', bytes(768)],
        [b'{"number": 1, "width": 1}', bytes(768)],
        [b"5"],
        [b"[" * 9_000],
        [b'{"code": 1}'],
        [b'{"number": 1, "width": null, "height": 1}', bytes(768)],
        [b'{"number": 1, "width": Infinity, "height": 1}', bytes(768)],
        [b"[]", bytes(768)],
    ],
    ids=["long", "json", "more pixels", "fewer pixels", "words", "keys", *"abcdef"],
)
def test_another_answer_is_not_taken(messages):
    ours, theirs = Pipe()
    with ours, theirs, pytest.raises((OSError, ValueError)):
        for message in messages:
            theirs.send_bytes(message)
        receive_result(ours, 16)


@pytest.mark.parametrize("messages", [[bytes(10_001)], [b'{"number": 1, "width": 1, "height": 1}', bytes(769)]])
def test_no_more_is_read_than_an_answer_may_have(messages):
    ours, theirs = Pipe()
    with ours, theirs:
        for message in messages:
            theirs.send_bytes(message)
        with pytest.raises(OSError, match="bad message length"):
            receive_result(ours, 16)


# ----------------------------------------------------------------------------------------------- the process itself


def test_a_process_bounds_itself_and_answers_until_the_other_end_closes(monkeypatch):
    ours, theirs = Pipe()
    limits, handled = {}, []
    monkeypatch.setattr(sys, "argv", ["decoder", "17"])
    monkeypatch.setattr(decoder_process, "Connection", lambda number: theirs if number == 17 else None)
    monkeypatch.setattr(decoder_process.signal, "signal", lambda *given: handled.append(given))
    names = {value: name for name, value in vars(decoder_process.resource).items() if name.startswith("RLIMIT_")}

    def setrlimit(limit, values):
        limits[names[limit]] = values
        if len(limits) < 3:
            raise (ValueError, OSError)[len(limits) - 1]("a lower limit is set")

    monkeypatch.setattr(decoder_process.resource, "setrlimit", setrlimit)
    ours.send(job(b"nothing"))
    ours.send(job(make_image()))
    monkeypatch.setattr(theirs, "recv", Until(theirs.recv, 2))
    main()
    assert ours.recv_bytes() == READY == b"ready"
    assert receive_result(ours, 16).code == "invalid_image" and receive_result(ours, 16).width == 60
    assert handled == [(signal.SIGINT, signal.SIG_IGN)]
    assert limits == {"RLIMIT_AS": (3_000_000_000,) * 2, "RLIMIT_CORE": (0, 0), "RLIMIT_FSIZE": (0, 0)}


class Until:
    """Answers so many times, then as a socket whose other end has closed."""

    def __init__(self, action, times):
        self.action, self.left = action, times

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise EOFError
        return self.action()


# --------------------------------------------------------------------------------------------------- its driver


class Process(decoders._DecoderProcess):
    """A driver whose process is not there: what comes from its socket is given."""

    def __init__(self, *, in_time=True, error=None):
        self.ended, self.waits, self.error = Counter(), [], error
        self._process = SimpleNamespace(
            poll=lambda: None, kill=lambda: self.note("kill"), wait=lambda: self.note("wait")
        )
        self._connection = SimpleNamespace(
            send=lambda _: None,
            poll=lambda seconds: self.waits.append(seconds) or in_time,
            close=lambda: self.note("close"),
            recv_bytes=self.receive,
        )

    def note(self, what):
        self.ended[what] += 1

    def receive(self, *_):
        if self.error:
            raise self.error
        return json.dumps({"code": "c", "message": "m"}).encode()


ENDED = {"close": 1, "kill": 1, "wait": 1}


def test_an_answer_in_time_leaves_the_process_and_a_late_one_ends_it():
    good = Process()
    assert good.decode(job(b"x"), 2.5) == DecodeError("c", "m") and good.waits == [2.5] and not good.ended
    late = Process(in_time=False)
    with pytest.raises(TimeoutError):
        late.decode(job(b"x"), 2.5)
    assert late.ended == ENDED


@pytest.mark.parametrize("error", [EOFError(), OSError(), ValueError()])
def test_a_process_that_fails_is_ended_and_its_image_refused(error):
    process = Process(error=error)
    message = "the image ended its decoder: it is damaged, or needs too much memory."
    assert process.decode(job(b"x"), 1) == DecodeError("invalid_image", message)
    assert process.ended == ENDED
    with pytest.raises(RuntimeError):
        Process(error=RuntimeError("bug")).decode(job(b"x"), 1)


KEPT = {"PATH": "/bin:/usr/bin", "LD_LIBRARY_PATH": "/opt/lib", "LANG": "C.UTF-8"}


def test_a_process_is_started_with_what_it_needs_and_no_more(monkeypatch):
    started = {}

    def popen(command, **options):
        started.update(options, command=command, held=os.dup(options["pass_fds"][0]))
        return SimpleNamespace(poll=lambda: 0, kill=lambda: started.update(killed=True), wait=lambda: None)

    monkeypatch.setattr(decoders.subprocess, "Popen", popen)
    monkeypatch.setattr(decoders, "START_S", 0.0)
    monkeypatch.setenv("SECRET", "x")
    for name, value in KEPT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"^a decoder process did not start within 0 s\.$"):
        decoders._DecoderProcess()
    os.close(started["held"])
    (number,) = started["pass_fds"]
    assert started["command"] == [sys.executable, "-m", "pipelines.serving.decoder_process", str(number)]
    assert started["killed"] and started["stdin"] == started["stdout"] == decoders.subprocess.DEVNULL
    environment = started["env"]
    assert environment.pop("PYTHONPATH").split(":") == [path for path in sys.path if path]
    assert environment == {**KEPT, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def test_a_job_that_has_not_begun_in_time_is_given_up_and_one_that_has_is_waited_for(monkeypatch):
    begun, release, decoded = threading.Event(), threading.Event(), []

    class Slow:
        is_alive = True

        def decode(self, given, timeout_s):
            begun.set()
            release.wait(60)
            decoded.append(given.source)
            return DecodeError(str(given.source), "m")

    monkeypatch.setattr(decoders, "_DecoderProcess", Slow)
    pool = decoders.ImageDecoders(1)
    submit = pool._threads.submit
    monkeypatch.setattr(pool._threads, "submit", lambda *job: (submit(*job), begun.wait(60))[0])

    async def crowd():
        first = asyncio.create_task(pool.decode(job(b"1"), wait_s=0.01, timeout_s=1))
        await asyncio.sleep(0.03)
        with pytest.raises(decoders.DecoderBusy):
            await asyncio.wait_for(pool.decode(job(b"2"), wait_s=0.01, timeout_s=60), 60)
        assert not first.done(), "it is being decoded"
        release.set()
        return await first

    assert asyncio.run(crowd()).code == "b'1'"
    pool._threads.shutdown()
    assert decoded == [b"1"]


def test_the_processes_of_all_threads_end_with_their_pool(monkeypatch):
    monkeypatch.setattr(decoders, "_DecoderProcess", Process)
    pool = decoders.ImageDecoders(2)
    threads = [threading.Thread(target=pool._decode, args=(job(b"x"), 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    processes = list(pool._processes)
    assert len(processes) == 2 and not any(process.ended for process in processes)
    pool.close()
    assert [process.ended for process in processes] == [ENDED] * 2


def test_processes_are_kept_replaced_and_closed(monkeypatch):
    made = []

    def start():
        made.append(Process())
        return made[-1]

    monkeypatch.setattr(decoders, "_DecoderProcess", start)
    pool = decoders.ImageDecoders(1)
    shutdown = pool._threads.shutdown
    for _ in range(2):
        assert pool._decode(job(b"x"), 1.5) == DecodeError("c", "m")
    assert len(made) == 1 and made[0].waits == [1.5, 1.5] and pool._processes == {made[0]}
    made[0]._process.poll = lambda: -9
    pool._decode(job(b"x"), 1)
    assert len(made) == 2 and pool._processes == {made[1]}, "what died is forgotten"
    asked = []
    monkeypatch.setattr(pool._threads, "shutdown", lambda **how: asked.append(how) or shutdown(**how))
    pool.close()
    assert asked == [{"wait": False, "cancel_futures": True}], "what waits is not begun"
    assert made[1].ended == ENDED and not made[0].ended
    with pytest.raises(RuntimeError):
        pool._threads.submit(print)
    assert decoders.ImageDecoders()._threads._max_workers == 2 and decoders.START_S == 30
