"""What units of work ask of Ray Data, by a stand-in for it; tests/integration/test_units.py uses the real one."""

from __future__ import annotations

import pickle
import warnings
from contextlib import contextmanager
from functools import partial

import pytest

from pipelines import units as module
from pipelines.settings import Settings
from pipelines.units import Workers, _Attempt, _Outcome, _run_on_ray, _TasksAhead, map_units

ray_data = pytest.importorskip("ray.data")


def adder():
    return lambda unit: unit + 1


class Context:
    """Ray Data's context, with what is set while data sets are made."""

    def __init__(self):
        self.max_errored_blocks, self.op_resource_reservation_enabled, self.config, self.removed = 7, "was", {}, []

    def set_config(self, key, value):
        self.config[key] = value

    def remove_config(self, key):
        self.removed.append(key)
        self.config.pop(key, None)


class DataSet:
    def __init__(self, rows, seen):
        self.rows, self.seen = rows, seen

    def map(self, function, *, fn_constructor_args=None, **options):
        self.seen.update(options, function=function, arguments=fn_constructor_args)
        self.seen.update(context=vars(self.seen["made_in"]).copy(), config=dict(self.seen["made_in"].config))
        warnings.warn("`ray_remote_args` is deprecated, say more", stacklevel=1)
        if self.seen.get("warns"):
            warnings.warn("something else", stacklevel=1)
        work = function(*fn_constructor_args) if fn_constructor_args else function
        return DataSet([work(row) for row in self.rows], self.seen)

    def set_name(self, name):
        self.seen["name"] = name

    def iter_rows(self):
        return iter(self.rows)


@pytest.fixture
def seen(monkeypatch):
    """What Ray Data was asked for."""
    found = {"made_in": Context()}

    def from_items(items, override_num_blocks):
        found.update(items=items, blocks=override_num_blocks)
        return DataSet(items, found)

    monkeypatch.setattr(module, "quiet_ray_data", lambda: found["made_in"])
    monkeypatch.setattr(ray_data, "from_items", from_items)
    monkeypatch.setattr(ray_data, "ActorPoolStrategy", lambda **sizes: ("actors", sizes))
    monkeypatch.setattr(ray_data, "TaskPoolStrategy", lambda **sizes: ("tasks", sizes))
    return found


def run(workers, groups=((2, 0), (1,)), one_by_one=False):
    done = list(_run_on_ray(adder, [10, 20, 30], _Attempt(groups, 3, one_by_one), workers, "adding"))
    return [(number, outcome.result) for number, outcome in done]


def test_tasks_get_their_groups_and_results_their_numbers(seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(Workers(3, num_cpus=2.0)) == [(2, 31), (0, 11), (1, 21)]
    assert seen["blocks"] == 2
    assert run(Workers(3), groups=((2,), (0,), (1,))) == [(2, 31), (0, 11), (1, 21)] and seen["blocks"] == 3
    run(Workers(3, num_cpus=2.0))
    assert [(row["numbers"], [pickle.loads(unit) for unit in row["units"]]) for row in seen["items"]] == [
        ([2, 0], [30, 10]),
        ([1], [20]),
    ]
    assert (seen["compute"], seen["max_retries"], seen["name"]) == (("tasks", {}), 3, "adding")
    assert (seen["num_cpus"], seen["num_gpus"]) == (2.0, None) and "max_task_retries" not in seen


def test_other_warnings_of_ray_data_are_heard(seen):
    seen["warns"] = True
    with pytest.warns(UserWarning, match="^something else$"):
        run(Workers(3))


def test_tasks_take_their_share_of_a_cluster_of_ones_own(seen, monkeypatch):
    monkeypatch.setattr(module, "worker_share", lambda count: {"shares": 12 // count})
    run(Workers(3))
    assert seen.pop("resources") == {"shares": 4}
    run(Workers(3, reuse_setup=True))
    run(Workers(None))
    monkeypatch.setattr(module, "worker_share", lambda count: {})
    run(Workers(3))
    assert "resources" not in seen, "actors are bounded by their pool; a cluster of others has no shares"


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, (1, 1)), (2, (2, 2)), (9, (2, 2)), (None, (1, None))],
)
def test_actors_are_no_more_than_there_are_groups(seen, count, sizes):
    assert run(Workers(count, num_gpus=0.5, reuse_setup=True)) == [(2, 31), (0, 11), (1, 21)]
    least, most = sizes
    assert seen["compute"] == (
        "actors",
        {"min_size": least, "max_size": most, "max_tasks_in_flight_per_actor": None},
    )
    assert (seen["num_gpus"], seen["max_task_retries"], seen["arguments"]) == (0.5, 3, (adder,))
    assert seen["function"] is module._Runner and "max_retries" not in seen


def test_an_actor_gets_one_group_at_a_time_where_neighbours_are_not_to_be_lost(seen):
    run(Workers(2, reuse_setup=True), one_by_one=True)
    assert seen["compute"][1]["max_tasks_in_flight_per_actor"] == 1


def test_without_groups_ray_is_not_asked(seen):
    assert run(Workers(2), groups=()) == [] and "items" not in seen


@pytest.mark.parametrize("reuse_setup", [False, True])
def test_the_context_is_as_it_was_once_the_data_set_is_made(seen, reuse_setup):
    workers = Workers(2, reuse_setup=reuse_setup)
    run(workers)
    assert seen["context"]["max_errored_blocks"] == -1, "what fails is left out"
    assert seen["context"]["op_resource_reservation_enabled"] == ("was" if reuse_setup else False)
    policies = seen["config"].get("backpressure_policies.enabled", [])
    assert [(policy.func, policy.args) for policy in policies] == ([] if reuse_setup else [(_TasksAhead, (workers,))])
    context = seen["made_in"]
    assert (context.max_errored_blocks, context.op_resource_reservation_enabled, context.config) == (7, "was", {})
    with pytest.raises(KeyError), module._data_context(workers):
        raise KeyError
    assert (context.max_errored_blocks, context.op_resource_reservation_enabled, context.config) == (7, "was", {})
    assert context.removed == ["backpressure_policies.enabled"] * 2


def test_a_policy_limits_no_outputs():
    assert _TasksAhead(Workers()).max_task_output_bytes_to_read(None) is None and _TasksAhead.name == "TasksAhead"
    assert partial(_TasksAhead, Workers(1))("context", "topology")._workers == Workers(1)


def test_units_run_in_the_cluster_of_the_settings_where_there_is_room_for_one(monkeypatch):
    told, settings = [], Settings(num_cpus=3)

    @contextmanager
    def start(given):
        told.append(("start", given))
        yield
        told.append("stop")

    def run(setup, units, attempt, workers, name):
        told.append((setup, list(units), attempt.groups, workers, name))
        yield from ((number, _Outcome(units[number])) for group in attempt.groups for number in group)

    monkeypatch.setattr(module, "start_ray", start)
    monkeypatch.setattr(module, "check_resources", lambda needs, what: told.append((needs, what)))
    monkeypatch.setattr(module, "_run_on_ray", run)
    workers = Workers(2, num_cpus=0.5, num_gpus=0.25)
    assert list(map_units(adder, [5, 6], workers, settings, name="adding")) == [(5, 5), (6, 6)]
    assert told == [
        ("start", settings),
        ({"CPU": 0.5, "GPU": 0.25}, "a worker of adding"),
        (adder, [5, 6], [[0], [1]], workers, "adding"),
        "stop",
    ]


def test_groups_leave_some_for_each_worker_that_the_cluster_has_room_for(monkeypatch):
    monkeypatch.setattr(module, "_room", lambda workers: {0.5: 2}[workers.num_cpus])
    first, _ = module._attempts(range(17), Workers(None, num_cpus=0.5), lambda unit: 1)
    assert first.groups == [*([n, n + 1] for n in range(0, 16, 2)), [16]]
    first, _ = module._attempts(range(16), Workers(1), lambda unit: 1)
    assert first.groups == [[n, n + 1, n + 2, n + 3] for n in range(0, 16, 4)]
