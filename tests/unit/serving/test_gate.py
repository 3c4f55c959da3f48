"""Admission: slots in all and per client, and the estimate of when to come back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pipelines.serving import gate as gates
from pipelines.serving.errors import ProtocolError
from pipelines.serving.gate import Gate

pytestmark = pytest.mark.security


def fill(gate, client, count):
    stack = ExitStack()
    for _ in range(count):
        stack.enter_context(gate.admit(client))
    return stack


def refusal(gate, client):
    with pytest.raises(ProtocolError) as caught, gate.admit(client):
        pass
    assert caught.value.status == 429
    return caught.value


def test_places_are_counted_and_given_back():
    counts = []
    gate = Gate(capacity=2, parallel=1, per_client=2, on_change=counts.append)
    with fill(gate, "a", 2):
        assert "2 requests in flight" in refusal(gate, "a").message
    with pytest.raises(ZeroDivisionError), gate.admit("a"):
        1 / 0  # noqa: B018
    assert gate.in_flight == 0 and counts == [1, 2, 1, 0, 1, 0]


def test_a_closed_gate_lets_nobody_in_and_counts_who_is_there():
    gate = Gate(capacity=2, parallel=1)
    with fill(gate, "a", 1):
        gate.is_closed = True
        with pytest.raises(ProtocolError) as caught, gate.admit("b"):
            pass
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "unavailable", 5)
        assert gate.in_flight == 1
    assert gate.in_flight == 0


def test_one_client_cannot_take_every_place():
    gate = Gate(capacity=80, parallel=16)
    with fill(gate, "greedy", 80):
        refusal(gate, "greedy")
        with fill(gate, "other", 40):  # its half
            refusal(gate, "other")
            refusal(gate, "greedy")
            with fill(gate, "third", 26):  # a third
                refusal(gate, "third")


def test_there_is_an_end_to_overbooking():
    gate = Gate(capacity=4, parallel=1)
    with fill(gate, "a", 4), fill(gate, "b", 2), fill(gate, "c", 1), fill(gate, "d", 1):
        assert gate.in_flight == 8
        refusal(gate, "e")


def test_overbooking_ends_at_twice_the_capacity():
    gate = Gate(capacity=80, parallel=16)
    with fill(gate, "a", 80), fill(gate, "b", 40), fill(gate, "c", 26), fill(gate, "d", 13):
        with fill(gate, "d", 1):
            assert gate.in_flight == 160
            refusal(gate, "d")  # though its share is 20
        with gate.admit("d"):
            pass


def test_the_first_requests_are_taken_to_last_a_second():
    gate = Gate(capacity=5, parallel=1)
    with fill(gate, "a", 5):
        assert refusal(gate, "a").retry_after_s == 4


def test_the_share_of_a_client_can_be_set():
    gate = Gate(capacity=80, parallel=16, per_client=1)
    with fill(gate, "a", 1), fill(gate, "b", 1):
        assert "this client has 1 requests" in refusal(gate, "a").message


@pytest.mark.parametrize(
    ("in_flight", "mean_s", "wanted"),
    [
        (3, 4.0, 2),  # one waits: 4 s / 2
        (4, 1.0, 1),  # two are answered at a time, two wait: 1 s x 2 / 2
        (12, 1.0, 5),  # ten wait: 1 s x 10 / 2
        (12, 2.5, 13),  # 12.5 s, rounded up
        (2, 0.1, 1),  # never 0
        (12, 100.0, 60),  # never more than a minute
    ],
)
def test_retry_after_is_the_queue_times_the_mean_time(in_flight, mean_s, wanted):
    gate = Gate(capacity=in_flight, parallel=2, per_client=in_flight)
    gate._mean_seconds = mean_s
    with fill(gate, "a", in_flight):
        assert refusal(gate, "a").retry_after_s == wanted


def test_a_client_at_its_most_waits_for_those_in_flight_not_for_all_slots():
    gate = Gate(capacity=90, parallel=1, per_client=4)
    with fill(gate, "a", 4):
        assert refusal(gate, "a").retry_after_s == 3


def test_the_mean_time_follows_the_requests(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gates.time, "monotonic", lambda: now[0])
    gate = Gate(capacity=10, parallel=1)
    for _ in range(100):
        with gate.admit("a"):
            now[0] += 4.0
    assert gate._mean_seconds == pytest.approx(4.0, abs=0.05)


def test_a_request_moves_the_mean_time_by_a_twentieth(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gates.time, "monotonic", lambda: now[0])
    gate = Gate(capacity=10, parallel=1)
    with gate.admit("a"):
        now[0] += 5.0
    assert gate._mean_seconds == pytest.approx(1.0 + 0.05 * 4.0)


def test_clients_that_left_have_no_share():
    gate = Gate(capacity=80, parallel=16)
    for number in range(30):
        with gate.admit(f"client {number}"):
            pass
    with fill(gate, "a", 80), fill(gate, "b", 40):
        refusal(gate, "b")


def test_a_full_server_and_a_client_with_its_most_are_told_apart():
    gate = Gate(capacity=2, parallel=1)
    with fill(gate, "a", 2):
        for _ in range(2):
            assert (
                refusal(gate, "a").message == "the server has 2 requests in flight and takes no more; try again soon."
            )
        assert gate.in_flight == 2, "what is refused holds nothing"
    gate = Gate(capacity=9, parallel=1, per_client=2)
    with fill(gate, "b", 2), fill(gate, "c", 1):
        message = "this client has 2 requests in flight, the most that one client may have."
        assert refusal(gate, "b").message == message
        with gate.admit("c"):
            assert gate.in_flight == 4


def test_what_is_refused_does_not_move_the_mean_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gates.time, "monotonic", lambda: now[0])
    gate = Gate(capacity=1, parallel=1)
    with gate.admit("a"):
        now[0] += 9.0
        refusal(gate, "a")
        assert gate._mean_seconds == 1.0
    with pytest.raises(KeyError), gate.admit("a"):
        now[0] += 9.0
        raise KeyError
    assert gate._mean_seconds == pytest.approx(1.4 + 0.05 * (9 - 1.4)), "a request that fails takes its time too"
