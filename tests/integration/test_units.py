"""Units of work on a real Ray cluster: order, errors, processes that die."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from pipelines.settings import Settings
from pipelines.units import ATTEMPTS, UnitsLostError, Workers, map_units

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


@pytest.mark.parametrize("workers", [TASKS, ACTORS], ids=["tasks", "actors"])
def test_every_unit_gives_its_result(tmp_path, workers):
    done = dict(map_units(partial(setup, tmp_path), list(range(7)), workers, SETTINGS, name="double"))
    assert done == {n: 2 * n for n in range(7)}
    assert len(list(tmp_path.iterdir())) == (1 if workers.reuse_setup else 7)


def test_an_error_arrives_as_it_was_raised(tmp_path):
    with pytest.raises(ValueError, match=r"^bad unit$"):
        list(map_units(partial(setup, tmp_path), [1, "bad", 2], TASKS, SETTINGS, name="double"))


def alone(folder):
    def work(unit):
        mark = folder / "running"
        mark.touch(exist_ok=False)
        time.sleep(0.05)
        mark.unlink()
        return unit

    return work


def test_no_more_units_run_at_a_time_than_asked_for(tmp_path):
    done = dict(map_units(partial(alone, tmp_path), list(range(5)), Workers(1, num_cpus=0.1), SETTINGS, name="alone"))
    assert done == {n: n for n in range(5)}


def test_whoever_stops_early_leaves_no_unit_waiting(tmp_path):
    slow = partial(sleeper, tmp_path)
    running = map_units(slow, list(range(20)), Workers(None, num_cpus=0.5), SETTINGS, name="slow")
    next(running)
    running.close()
    time.sleep(1)
    before = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == before < 20


def sleeper(folder):
    def work(unit):
        (folder / str(unit)).touch()
        time.sleep(0.3)

    return work


@pytest.mark.parametrize("workers", [TASKS, ACTORS], ids=["tasks", "actors"])
def test_units_whose_process_dies_do_not_take_the_others_with_them(tmp_path, workers):
    done = []
    with pytest.raises(UnitsLostError, match="1 units of work") as error:
        done.extend(map_units(partial(setup, tmp_path), [1, "deadly", 2, 3], workers, SETTINGS, name="double"))
    assert sorted(done) == [(1, 2), (2, 4), (3, 6)]
    assert error.value.units == ("deadly",)
    assert (tmp_path / "deadly").stat().st_size == ATTEMPTS
