"""Units of work on a real Ray cluster: order, errors, processes that die."""

from __future__ import annotations

import itertools
import os
import signal
import time
from functools import partial

import pytest
import ray

from pipelines.settings import Settings
from pipelines.units import _POLICIES, ATTEMPTS, UnitsLostError, Workers, _data_context, map_units

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

SETTINGS = Settings(quiet=True)
TASKS = Workers(2, num_cpus=0.5)
ACTORS = Workers(1, num_cpus=0.5, reuse_setup=True)


def setup(folder):
    """Work that leaves a mark for each time it was set up."""
    (folder / f"setup-{os.getpid()}-{len(list(folder.iterdir()))}").touch()

    def work(unit):
        if unit == "bad":
            raise ValueError("bad unit")
        if unit == "deadly":
            with (folder / "deadly").open("a") as attempts:
                attempts.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return unit * 2

    return work


def test_only_data_sets_of_units_have_their_settings():
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.max_errored_blocks, context.op_resource_reservation_enabled
    with _data_context(TASKS):
        assert context.max_errored_blocks == -1 and not context.op_resource_reservation_enabled
        assert [policy().name for policy in context.get_config(_POLICIES)] == ["TasksAhead"]
    with _data_context(ACTORS):
        assert context.get_config(_POLICIES) is None
    assert context.get_config(_POLICIES) is None
    assert (context.max_errored_blocks, context.op_resource_reservation_enabled) == before


@pytest.mark.parametrize("workers", [TASKS, ACTORS], ids=["tasks", "actors"])
def test_every_unit_gives_its_result(tmp_path, workers):
    done = dict(map_units(partial(setup, tmp_path), list(range(7)), workers, SETTINGS, name="double"))
    assert done == {n: 2 * n for n in range(7)}
    assert len(list(tmp_path.iterdir())) == (1 if workers.reuse_setup else 7)


def timed():
    """Work that tells when it ran."""

    def work(unit):
        started = time.time()
        time.sleep(0.2)
        return started, time.time()

    return work


def test_ray_runs_no_more_of_the_tasks_submitted_ahead_than_there_may_be_workers():
    done = map_units(timed, list(range(8)), Workers(1, num_cpus=0.1), SETTINGS, name="timed")
    spans = sorted(span for _, span in done)
    assert len(spans) == 8
    assert all(after[0] >= before[1] for before, after in itertools.pairwise(spans)), "two ran at a time"


def test_no_more_actors_are_started_than_there_are_units(tmp_path, recwarn):
    workers = Workers(2, num_cpus=0.5, reuse_setup=True)
    assert list(map_units(partial(setup, tmp_path), [1], workers, SETTINGS, name="double")) == [(1, 2)]
    assert len(list(tmp_path.iterdir())) == 1
    assert not [str(each.message) for each in recwarn if "concurrent actors" in str(each.message)]


def test_actors_carry_their_arguments_so_that_ray_prints_no_error_of_theirs(tmp_path, monkeypatch, capfd):
    stored, put = [], ray.put
    monkeypatch.setattr(
        ray, "put", lambda value, *rest, **options: stored.append(value) or put(value, *rest, **options)
    )
    list(map_units(partial(setup, tmp_path), [1], ACTORS, SETTINGS, name="double"))
    kinds = {type(value).__name__ for value in stored}
    assert kinds and not kinds & {"MapTransformer", "DataContext"}
    assert "object store" not in capfd.readouterr().err, "Ray prints it once per process"


def test_an_error_arrives_as_it_was_raised(tmp_path):
    with pytest.raises(ValueError, match=r"^bad unit$"):
        list(map_units(partial(setup, tmp_path), [1, "bad", 2], TASKS, SETTINGS, name="double"))


def test_small_units_are_done_together_and_a_deadly_one_costs_the_others_nothing(tmp_path):
    units = [*range(20), "deadly", *range(20, 40)]
    one = Workers(1, num_cpus=0.5)
    done = []
    with pytest.raises(UnitsLostError, match="1 units of work") as error:
        for pair in map_units(partial(setup, tmp_path), units, one, SETTINGS, name="double", num_bytes=lambda unit: 1):
            done.append(pair)
    assert dict(done) == {n: 2 * n for n in range(40)} and len(done) == 40
    assert error.value.units == ("deadly",)
    assert (tmp_path / "deadly").stat().st_size == ATTEMPTS - 1 + 1
    setups = len([path for path in tmp_path.iterdir() if path.name.startswith("setup")])
    assert setups < 25, "one for each group, and for the units that a group has lost"


@pytest.mark.parametrize("workers", [TASKS, ACTORS], ids=["tasks", "actors"])
def test_units_whose_process_dies_do_not_take_the_others_with_them(tmp_path, workers):
    done = []
    with pytest.raises(UnitsLostError, match="1 units of work") as error:
        done.extend(map_units(partial(setup, tmp_path), [1, "deadly", 2, 3], workers, SETTINGS, name="double"))
    assert sorted(done) == [(1, 2), (2, 4), (3, 6)]
    assert error.value.units == ("deadly",)
    assert (tmp_path / "deadly").stat().st_size == ATTEMPTS
