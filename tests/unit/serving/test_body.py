"""Bodies: bounds on size, rate, time and number of values, before the work that they bound."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pipelines.serving import body as bodies
from pipelines.serving.service import CLIENT_CLOSED_REQUEST
from tests.serving_api import CHAT, Client, FakeBackend, ask, scope_of, words

pytestmark = pytest.mark.security


def exchange(client, messages, pause_s=0.0, scope=None):
    """Send ASGI messages with a pause before each; returns status, headers and body."""
    sent, waiting = [], list(messages)

    async def receive():
        await asyncio.sleep(pause_s)
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(client.app(scope or scope_of(), receive, send), 30))
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


def test_a_body_that_trickles_is_given_up(monkeypatch):
    """Ten bytes every 50 ms: the rate is bounded, not only the pauses; and nobody loses a place meanwhile."""
    monkeypatch.setattr(bodies, "GRACE_S", 0.3)
    client = Client(max_batch_size=1, max_queue=0)
    body = json.dumps(ask(words("x" * 5000))).encode()
    started = time.monotonic()
    status, headers, text = exchange(client, pieces(body, 10), pause_s=0.05)
    assert status == 408 and headers[b"connection"] == b"close" and b"too slowly" in text
    assert time.monotonic() - started < 3
    assert client.chat(ask(words("hi"))).status_code == 200


def test_a_steady_body_may_take_longer_than_the_grace(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 0.2)
    body = json.dumps(ask(words("x" * 9000), max_tokens=1)).encode()
    status, _, _ = exchange(Client(FakeBackend()), pieces(body, 1500), pause_s=0.1)
    assert status == 200


def test_the_whole_body_has_a_deadline(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 60)
    started = time.monotonic()
    status, _, text = exchange(Client(body_timeout_s=0.3), pieces(b"x" * 100_000, 1000), pause_s=0.05)
    assert status == 408 and b"within 0.3 s" in text and time.monotonic() - started < 3


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

    assert asyncio.run(attack_and_ask()).status_code == 200


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
            answered = await other.post(CHAT, json=ask(words("hi")))
            release.set()
            return answered, await too_much, await asyncio.gather(*held), await one.post(CHAT, json=ask(words("hi")))

    answered, too_much, held, after = asyncio.run(fill())
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
def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(body):
    client = Client()
    started = time.process_time()
    response = client.request("POST", CHAT, content=body)
    assert response.status_code == 400 and "values" in response.json()["error"]["message"]
    assert time.process_time() - started < 2


def test_many_wrong_values_within_the_bound_are_cheap():
    client = Client()
    for wrong in ({"messages": [{}] * 256}, {"messages": [{"role": "user", "content": [5] * 60}] * 256}):
        started = time.process_time()
        response = client.chat({**ask(words("hi")), **wrong})
        assert response.status_code == 400 and time.process_time() - started < 1
        assert len(response.content) < 1000


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

    asyncio.run(leave())
    registry = client.metrics.registry
    assert registry.get_sample_value("tinygptv_requests_total", {"status": "499"}) == 1
    assert registry.get_sample_value("tinygptv_in_flight_requests") == 0
