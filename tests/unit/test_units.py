"""Units of work in this process; tests/integration/test_units.py runs them on Ray."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from functools import partial

import pytest

from pipelines import cluster
from pipelines import units as units_module
from pipelines.settings import Settings
from pipelines.units import (
    UnitsLostError,
    Workers,
    _Attempt,
    _attempts,
    _dump_error,
    _groups,
    _Outcome,
    _room,
    _Runner,
    _TasksAhead,
    map_units,
)

HERE = Workers(0)
GROUP_BYTES = 64 * 2**20


def doubler(made):
    made.append("set up")
    return lambda unit: unit * 2


def test_units_run_in_order_and_the_work_is_set_up_once():
    made = []
    done = list(map_units(partial(doubler, made), [3, 1, 2], HERE, Settings(), name="double"))
    assert done == [(3, 6), (1, 2), (2, 4)]
    assert made == ["set up"]


def test_without_units_nothing_is_set_up():
    made = []
    assert list(map_units(partial(doubler, made), [], HERE, Settings(), name="double")) == []
    assert list(map_units(partial(doubler, made), [], Workers(2), Settings(), name="double")) == []
    assert made == []


class OddError(Exception):
    """Cannot be built again from its arguments."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail(error):
    def work(unit):
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [(ValueError("bad value"), ValueError, "bad value"), (OddError(1, 2), RuntimeError, "OddError: 1 and 2")],
)
def test_errors_travel_as_values_and_arrive_as_they_were_raised(error, kind, text):
    row = _Runner(partial(fail, error))({"numbers": [4], "units": [pickle.dumps("x")]})
    outcome = pickle.loads(row["outcomes"][0])
    assert row["numbers"] == [4]
    assert type(outcome.error) is kind
    assert str(outcome.error) == text
    assert pickle.loads(_dump_error(error)).result is None


def test_lost_units_are_named():
    error = UnitsLostError(["part-3", "part-4"])
    assert error.units == ("part-3", "part-4")
    assert "2 units" in str(error) and "'part-3'" in str(error)


@pytest.mark.parametrize(
    ("sizes", "most", "groups"),
    [
        ([1, 1, 1, 1, 1], 2, [[0, 1], [2, 3], [4]]),
        ([1, 1, 1], 0, [[0], [1], [2]]),
        ([GROUP_BYTES, 1, GROUP_BYTES - 1, 5, 5], 9, [[0], [1, 2], [3, 4]]),
        ([GROUP_BYTES - 1, 5, 7], 9, [[0, 1], [2]]),
        ([], 3, []),
    ],
)
def test_small_units_are_grouped_in_order(sizes, most, groups):
    assert _groups(sizes, most) == groups


@pytest.mark.parametrize(
    ("workers", "count"),
    [(Workers(), 8), (Workers(num_cpus=0.5), 16), (Workers(num_gpus=0.5), 4), (Workers(num_cpus=9), 1)],
)
def test_room_is_what_the_cluster_has(monkeypatch, workers, count):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert _room(workers) == count
    monkeypatch.setattr(ray, "cluster_resources", dict)  # a cluster that only grows when asked
    assert _room(workers) == 1


class Operator:
    """A stand-in for Ray Data's, with so many tasks submitted."""

    def __init__(self, num_tasks):
        self.num_tasks = num_tasks

    def num_active_tasks(self):
        return self.num_tasks


@pytest.mark.parametrize(
    ("workers", "most", "started_here"),
    [
        (Workers(), 8, False),
        (Workers(3), 3, False),
        (Workers(99, num_cpus=2.0), 4, False),
        (Workers(), 8, True),
        (Workers(1), 4, True),
        (Workers(3), 8, True),
    ],
)
def test_tasks_are_submitted_ahead_and_never_more_run_than_may(monkeypatch, workers, most, started_here):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    if started_here:
        monkeypatch.setattr(cluster._started_here, "is_set", lambda: True)
    policy = _TasksAhead(workers, "context", "topology", "resources")
    assert policy.can_add_input(Operator(most - 1)) and not policy.can_add_input(Operator(most))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 99, 900])
def test_as_many_workers_as_there_may_be_have_a_share_and_not_one_more(monkeypatch, count):
    assert cluster.worker_share(count) == {}
    monkeypatch.setattr(cluster._started_here, "is_set", lambda: True)
    ((name, share),) = cluster.worker_share(count).items()
    shares = cluster._init_arguments(Settings())["resources"][name]
    assert share == int(share) and count * share <= shares < (count + 1) * share


def test_a_cluster_that_has_grown_gets_more_tasks(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    clock = [5.0]
    monkeypatch.setattr("pipelines.units.time.monotonic", lambda: clock[0])
    policy = _TasksAhead(Workers())
    busy = Operator(8)
    assert not policy.can_add_input(busy)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    assert not policy.can_add_input(busy), "the cluster's size is asked for once a second"
    clock[0] += 1
    assert policy.can_add_input(busy)


def test_what_a_lost_process_held_is_done_again_one_by_one():
    sizes = [1, 1, 1, 1, GROUP_BYTES, 1, 1, 1]
    alone = [[n] for n in range(8)]
    grouped = [[0, 1], [2, 3], [4], [5, 6], [7]]
    assert list(_attempts(range(8), Workers(1), None)) == [_Attempt(alone, 3)]
    assert list(_attempts(range(8), Workers(3), lambda unit: sizes[unit])) == [_Attempt(alone, 3)]
    assert list(_attempts(range(8), Workers(1), lambda unit: sizes[unit])) == [
        _Attempt(grouped, 0),
        _Attempt(alone, 2, one_by_one=True),
    ]
    assert list(_attempts(range(8), Workers(1, reuse_setup=True), None)) == [
        _Attempt(alone, 1),
        _Attempt(alone, 1, one_by_one=True),
    ]


def test_a_process_sets_its_work_up_once_and_keeps_it():
    made = []
    runner = _Runner(partial(doubler, made))
    rows = [{"numbers": [n], "units": [pickle.dumps(n), pickle.dumps(n + 1)]} for n in (3, 5)]
    found = [[pickle.loads(outcome).result for outcome in runner(row)["outcomes"]] for row in rows]
    assert found == [[6, 8], [10, 12]] and made == ["set up"]


@pytest.fixture
def on_ray(monkeypatch):
    """Ray whose every attempt loses the units named for it; notes what each was asked for."""
    losses, asked = [], []

    def run(setup, units, attempt, workers, name):
        asked.append((attempt.groups, attempt.retries))
        lost = losses.pop(0)
        for number in (number for group in attempt.groups for number in group):
            if units[number] == "bad":
                yield number, _Outcome(None, ValueError("bad unit"))
            elif number not in lost:
                yield number, _Outcome(units[number] * 2)

    monkeypatch.setattr(units_module, "_run_on_ray", run)
    monkeypatch.setattr(units_module, "start_ray", lambda settings: nullcontext())
    monkeypatch.setattr(units_module, "check_resources", lambda needs, what: None)
    return losses, asked


def test_only_what_a_group_lost_is_done_again(on_ray):
    losses, asked = on_ray
    losses += [{2, 3}, set()]
    units = list("abcdefgh")
    done = list(map_units(None, units, Workers(1), Settings(), name="x", num_bytes=lambda unit: 1))
    assert done == [(unit, unit * 2) for unit in "abefghcd"]
    assert asked == [([[0, 1], [2, 3], [4, 5], [6, 7]], 0), ([[2], [3]], 2)]
    losses += [{2, 3}, {3}]
    with pytest.raises(UnitsLostError) as lost:
        list(map_units(None, units, Workers(1), Settings(), name="x", num_bytes=lambda unit: 1))
    assert lost.value.units == ("d",)


def test_an_error_of_a_unit_is_raised_as_it_is(on_ray):
    losses, _ = on_ray
    losses.append(set())
    done = map_units(None, ["a", "bad", "c"], Workers(2), Settings(), name="x")
    assert next(done) == ("a", "aa")
    with pytest.raises(ValueError, match="bad unit"):
        next(done)
