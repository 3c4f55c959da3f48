"""Bodies: bounds on size, rate, time and number of values, before the work that they bound."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import json
import logging
import threading
import time

import pytest

from pipelines.serving import body as bodies
from pipelines.serving.body import BodyReader
from pipelines.serving.errors import ProtocolError
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.service import CLIENT_CLOSED_REQUEST
from pipelines.settings import ServeSettings
from tests import virtual_time
from tests.serving_api import CHAT, Client, FakeBackend, ask, scope_of, words

pytestmark = pytest.mark.security


def exchange(client, messages, pause_s=0.0, scope=None):
    """Send ASGI messages with a pause before each, in virtual time; returns status, headers and body."""
    sent, waiting = [], list(messages)

    async def receive():
        await asyncio.sleep(pause_s)
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    virtual_time.run(asyncio.wait_for(client.app(scope or scope_of(), receive, send), 1000))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message.get("body", b"") for message in sent[1:])


def pieces(data, size):
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return [
        {"type": "http.request", "body": part, "more_body": number < len(parts)} for number, part in enumerate(parts, 1)
    ]


def test_a_large_body_is_refused_while_it_comes():
    client = Client(max_body_mb=0.01)
    sent = []

    async def endless():
        for _ in range(1000):
            sent.append(1)
            yield b"x" * 5000

    response = client.request("POST", CHAT, content=endless())
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"
    assert len(sent) == 3 and response.headers["connection"] == "close"


def test_a_body_that_declares_too_much_is_not_read():
    headers = [(b"content-length", b"16000001")]
    status, _, _ = exchange(Client(), [], scope=scope_of(headers=headers))
    assert status == 413
    status, _, body = exchange(Client(), pieces(b"{}", 9), scope=scope_of(headers=[(b"content-length", b"x")]))
    assert status == 400 and b"model" in body


def test_a_compressed_body_is_refused_by_name():
    """Read as JSON it would be "not valid", which sends people to look for a comma."""
    scope = scope_of(headers=[(b"content-encoding", b"gzip")])
    status, headers, body = exchange(Client(), pieces(gzip.compress(b"{}"), 99), scope=scope)
    assert (status, headers[b"connection"]) == (415, b"close") and b"compressed (gzip): send plain JSON" in body
    plain = scope_of(headers=[(b"content-encoding", b"Identity")])
    assert exchange(Client(), pieces(b"{}", 9), scope=plain)[0] == 400


def test_a_body_may_begin_with_the_mark_of_utf8():
    response = Client().request("POST", CHAT, content=codecs.BOM_UTF8 + json.dumps(ask(words("hi"))).encode())
    assert response.status_code == 200


def test_a_body_that_trickles_is_given_up():
    """Ten bytes every 50 ms: the rate is bounded, not only the pauses; and nobody loses a place meanwhile."""
    client = Client(max_batch_size=1, max_queue=0)
    parts = pieces(json.dumps(ask(words("x" * 5000))).encode(), 10)
    status, headers, text = exchange(client, parts, pause_s=0.05)
    assert status == 408 and headers[b"connection"] == b"close" and b"too slowly" in text
    assert len(parts) > 300, "at 50 ms each they take three times the grace"
    assert client.chat(ask(words("hi"))).status_code == 200


def test_a_steady_body_may_take_longer_than_the_grace():
    body = json.dumps(ask(words("x" * 9000), max_tokens=1)).encode()
    for pause_s, wanted in ((0.85, 200), (0.9, 408)):  # the last of seven comes within 5 s and 1 s for each 8 kB
        status, _, _ = exchange(Client(FakeBackend()), pieces(body, 1500), pause_s=pause_s)
        assert status == wanted


def test_the_whole_body_has_a_deadline(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 60)
    status, _, text = exchange(Client(body_timeout_s=3), pieces(b"x" * 100_000, 1000), pause_s=0.05)
    assert status == 408 and b"within 3 s" in text


def test_slow_bodies_take_no_place(monkeypatch):
    """A hundred connections that send nothing more: others are answered."""
    client = Client(max_batch_size=2, max_queue=2)

    async def trickle(send_nothing):
        body = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive():
            return body.pop() if body else await send_nothing.wait()

        await client.app(scope_of(), receive, ignore)

    async def ignore(message):
        pass

    async def attack_and_ask():
        never = asyncio.Event()
        attackers = [asyncio.create_task(trickle(never)) for _ in range(100)]
        await asyncio.sleep(0.05)
        async with client.open() as http:
            response = await http.post(CHAT, json=ask(words("hi")))
        for attacker in attackers:
            attacker.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        return response

    assert virtual_time.run(attack_and_ask()).status_code == 200


def test_bodies_in_memory_are_bounded_in_all_and_per_client(monkeypatch):
    monkeypatch.setattr(bodies, "READ_AT_ONCE", 4)
    client = Client(max_body_mb=0.01)  # 40 kB in all, 30 kB of one client

    async def hold(http, release, size):
        async def content():
            yield b"x" * size
            await release.wait()

        return await http.post(CHAT, content=content())

    async def fill():
        release = asyncio.Event()
        async with client.open() as one, client.open(("127.0.0.2", 1)) as other:
            held = [asyncio.create_task(hold(one, release, 9000)) for _ in range(3)]
            await asyncio.sleep(0.1)
            too_much = asyncio.create_task(hold(one, release, 9000))
            await asyncio.sleep(0.1)
            answered = await other.post(CHAT, json=ask(words("x" * 8000)))  # beside the first client's 27 kB
            release.set()
            return answered, await too_much, await asyncio.gather(*held), await one.post(CHAT, json=ask(words("hi")))

    answered, too_much, held, after = virtual_time.run(fill())
    assert answered.status_code == 200
    assert too_much.status_code == 429 and "retry-after" in too_much.headers
    assert [response.status_code for response in held] == [400] * 3, "they are no JSON"
    assert after.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tinygpt-v", "messages": [' + b"5," * 5_000_000 + b"5]}",
        b'{"model": "tinygpt-v", "messages": [{"role": "user", "content": [' + b"{}," * 3_000_000 + b"{}]}]}",
        b"[" * 10_000_000,
        b'{"tools": [' + b'{"type": 1},' * 900_000 + b"{}]}",
    ],
    ids=["messages", "parts", "depth", "tools"],
)
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(monkeypatch, body):
    monkeypatch.setattr(bodies, "pydantic_core", None)
    response = Client().request("POST", CHAT, content=body)
    assert response.status_code == 400 and "values" in response.json()["error"]["message"]


def test_many_wrong_values_within_the_bound_are_cheap():
    client = Client()
    for wrong in ({"messages": [{}] * 256}, {"messages": [{"role": "user", "content": [5] * 60}] * 256}):
        started = time.process_time()
        response = client.chat({**ask(words("hi")), **wrong})
        assert response.status_code == 400 and len(response.content) < 1000
        assert time.process_time() - started < 20, "of the processor, not of the clock; some 0.1 s"


def test_very_many_messages_are_refused_before_any_work():
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    client = Client()
    response = client.chat({**ask(), "messages": [*turns * 20_000, {"role": "user", "content": "hi"}]})
    assert response.status_code == 400 and response.json()["error"]["code"] == "too_many_messages"
    assert not client.backend.jobs
    allowed = [*turns * 127, {"role": "user", "content": "hi"}]
    assert client.chat({**ask(), "messages": allowed}).status_code == 200
    assert client.chat({**ask(), "messages": [*turns, *allowed]}).status_code == 400
    exact = Client(max_messages=3)
    assert exact.chat({**ask(), "messages": [*turns, {"role": "user", "content": "hi"}]}).status_code == 200
    refused = exact.chat({**ask(), "messages": [{"role": "user", "content": "hi"}] * 4}).json()["error"]
    assert refused["message"] == "the conversation has 4 messages; this server takes 3."
    assert refused["param"] == "messages"


def test_a_client_that_leaves_is_no_error_of_the_server(caplog):
    client = Client()
    status, _, _ = exchange(
        client, [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    )
    assert status == CLIENT_CLOSED_REQUEST
    registry = client.metrics.registry
    assert registry.get_sample_value("tinygptv_requests_total", {"status": "499"}) == 1
    assert registry.get_sample_value("tinygptv_requests_total", {"status": "500"}) is None
    assert not caplog.records


def test_a_request_that_is_cancelled_counts_as_left():
    client = Client(FakeBackend(wait=5))

    async def leave():
        async with client.open() as http:
            task = asyncio.create_task(http.post(CHAT, json=ask(words("hi"))))
            await asyncio.sleep(0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    virtual_time.run(leave())
    registry = client.metrics.registry
    assert registry.get_sample_value("tinygptv_requests_total", {"status": "499"}) == 1
    assert registry.get_sample_value("tinygptv_in_flight_requests") == 0


# --------------------------------------------------------------------------------------------- the reader by itself


class Sent:
    """A request whose body comes in these pieces; then it stays open until ``end`` is set."""

    def __init__(self, *pieces, end=None, **headers):
        self.pieces, self.end, self.headers = pieces, end, headers

    async def stream(self):
        for piece in self.pieces:
            yield piece
        if self.end is not None:
            await self.end.wait()


def reader(**settings):
    return BodyReader(ServeSettings(**{"max_body_mb": 0.01, **settings}))


def refused(call):
    with pytest.raises(ProtocolError) as caught:
        virtual_time.run(call)
    error = caught.value
    return error.status, error.code, error.message, error.closes, error.retry_after_s


TOO_LARGE = (413, "request_too_large", "the request is larger than 0.01 MB: send fewer or smaller images.", True, None)


def test_the_bound_on_a_body_is_exact():
    within = Sent(b"a" * 4000, b"b" * 6000, **{"content-length": "10000"})
    assert asyncio.run(reader().read(within, "a")) == b"a" * 4000 + b"b" * 6000
    assert refused(reader().read(Sent(b"x", **{"content-length": "10001"}), "a")) == TOO_LARGE
    assert refused(reader().read(Sent(b"x" * 4000, b"x" * 6001), "a")) == TOO_LARGE
    assert asyncio.run(reader().read(Sent(), "a")) == b""


def test_a_slow_body_is_told_the_rate_and_the_time():
    message = "the request's body came too slowly: send at least 8 kB per second, and all of it within 2.5 s."
    found = refused(reader(body_timeout_s=2.5).read(Sent(b"x", end=asyncio.Event()), "a"))
    assert found == (408, "request_timeout", message, True, None)


def test_a_body_that_does_not_begin_has_no_longer_than_the_settings_say():
    async def wait():
        clock = asyncio.get_running_loop().time
        started = clock()
        with pytest.raises(ProtocolError, match=r"within 3 s"):
            await reader(body_timeout_s=3).read(Sent(end=asyncio.Event()), "a")
        return clock() - started

    assert virtual_time.run(wait()) == pytest.approx(3)


def test_a_refused_body_leaves_those_of_its_client_counted():
    """Else a client that sends something too large now and then has room without an end."""
    reading = reader()

    async def read():
        end = asyncio.Event()
        first = asyncio.create_task(reading.read(Sent(b"x" * 4000, end=end), "a"))
        await asyncio.sleep(0)
        for refused_one in (Sent(b"x" * 20_000), Sent(b"x" * 5000, b"x" * 6000)):
            with pytest.raises(ProtocolError):
                await reading.read(refused_one, "a")
        during = dict(reading._held)
        end.set()
        await first
        return during

    assert asyncio.run(read()) == {"a": 4000} and reading._held == {}


def test_room_for_bodies_is_32_of_the_largest_and_three_quarters_of_it_for_one_client():
    reading = reader()
    assert reading.max_held == 320_000
    reading._hold("a", 240_000)
    with pytest.raises(ProtocolError) as caught:
        reading._hold("a", 1)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 2)
    assert caught.value.message == "the server is reading too many large requests; try again soon."
    reading._held["a"] -= 1
    reading._hold("b", 80_000)
    with pytest.raises(ProtocolError):
        reading._hold("c", 1)


@pytest.mark.parametrize(("size", "in_thread"), [(99_999, False), (100_000, True)])
def test_a_large_body_is_parsed_in_a_thread(monkeypatch, size, in_thread):
    reading = reader()
    monkeypatch.setattr(reading, "_parse", lambda body, kind: (len(body), threading.current_thread()))
    length, thread = asyncio.run(reading.parse(b"x" * size))
    assert length == size and (thread is not threading.main_thread()) is in_thread


def test_so_many_values_are_read():
    for count, code in ((200_000, "invalid_json"), (200_001, "request_too_large")):
        body = b"[{" + b"," * (count - 2)
        found = refused(reader().parse(body))
        assert found[:2] == (400, code)
    assert found[2] == "the request holds about 200001 values; at most 200000 are read."
    status, code, message, *_ = refused(reader().parse(b'{"temperature": NaN}'))
    assert (status, code) == (400, "invalid_json")
    assert message.startswith("the request is not valid JSON: ") and "column 17" in message


def about(content=None, **fields):
    return {"model": "m", "messages": [{"role": "user", "content": content or "hi"}], **fields}


@pytest.mark.parametrize(
    ("data", "param", "message"),
    [
        (5, None, "the request: Input should be a valid dictionary or instance of ChatRequest."),
        ({}, "model", "model: Field required."),
        (about(box=[1, "a", 3, 4]), "box.1", "box.1: Input should be a valid number, unable"),
        (about(stop=[""]), "stop", "stop: stop takes up to 4 strings of 1 to 128 characters."),
        (about(tools=[1]), "tools", "tools is not supported by this server: leave it out."),
        (about(messages=[5]), "messages.0", "messages.0: Input should be a valid dictionary"),
        (about(messages=[{"role": "user"}]), "messages.0.content", "messages.0.content: Field required."),
        (about([{"type": "text"}]), "messages.0.content.0.text", "messages.0.content.0.text: Field required."),
        (about([{"type": "x"}]), "messages.0.content.0", "messages.0.content.0: Input tag 'x'"),
        (about([{"type": "image_url"}]), "messages.0.content.0.image_url", "messages.0.content.0.image_url: Field"),
        (
            about([words("a"), {"type": "image_url", "image_url": {"url": ""}}]),
            "messages.0.content.1.image_url.url",
            "messages.0.content.1.image_url.url: String should have at least 1 character.",
        ),
        (
            about(messages=[{"role": "system", "content": [{"type": "text"}]}]),
            "messages.0.content.0.text",
            "messages.0.content.0.text: Field required.",
        ),
    ],
)
def test_the_field_that_is_wrong_is_named_as_the_request_has_it(data, param, message):
    with pytest.raises(ProtocolError) as caught:
        reader()._parse(json.dumps(data).encode(), ChatRequest)
    error = caught.value
    assert (error.status, error.param) == (400, param) and error.message.startswith(message)
    assert error.code == ("unsupported_parameter" if param == "tools" else "invalid_value")


def test_names_of_ignored_fields_are_cut_and_counted(caplog):
    caplog.set_level(logging.INFO, "pipelines.serving")
    reading = reader()
    reading._log_ignored(["x" * 50, *(f"n{n}" for n in range(11))])
    names = ", ".join(repr(name) for name in ("x" * 40, *(f"n{n}" for n in range(9))))
    assert caplog.messages == [f"ignored request fields: {names}"]
    reading._log_ignored(["n10", "n0"])
    assert len(caplog.messages) == 1, "all of them are known"
    reading._log_ignored([f"m{n}" for n in range(88)])
    reading._log_ignored(["one more"])
    assert len(caplog.messages) == 2 and len(reading._ignored_names) == 100
