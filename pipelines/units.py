"""Independent units of work, in this process or on Ray: results as they finish.

A unit is a small picklable description: which file, which rows. Its work writes its own output, so nothing large
travels between processes, and whoever calls passes only those units whose output is not there yet.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.cluster import quiet_ray_data, start_ray
from pipelines.settings import Settings

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Work = Callable[[Unit], Result]

ATTEMPTS = 4
"""Runs of a unit whose process dies. Ray Data's own default has no bound: one unit could stall a job for ever."""


class UnitsLostError(RuntimeError):
    """Units whose process died in every attempt, for example for lack of memory. All other units are finished.

    Attributes:
        units: the units without a result.
    """

    def __init__(self, units: Sequence[Any]) -> None:
        super().__init__(
            f"{len(units)} units of work have no result, because their process died each time (out of memory?); the "
            f"first is {units[0]!r}. Give each more memory, or run fewer at a time with num_workers=."
        )
        self.units: tuple[Any, ...] = tuple(units)


@dataclass(frozen=True)
class Workers:
    """Number of units at a time, and resources of each.

    Attributes:
        count: most units at a time; 0 runs them in this process, None as many as the cluster has room for.
        num_cpus: logical CPUs of one.
        num_gpus: GPUs of one, or a fraction.
        reuse_setup: set the work up once per process and keep it, as Ray actors; else once per unit, as Ray tasks.
    """

    count: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    reuse_setup: bool = False


def map_units(
    setup: Callable[[], Work[Unit, Result]], units: Sequence[Unit], workers: Workers, settings: Settings, *, name: str
) -> Iterator[tuple[Unit, Result]]:
    """Run every unit once.

    Args:
        setup: makes the function that does a unit's work, in the process that will call it; picklable.
        units: what is to be done; picklable.
        workers: where and how many at a time.
        settings: of the cluster to join or start.
        name: of the work, in Ray's dashboard.

    Yields:
        Units with their results, in the order in which they finish.

    Raises:
        Exception: the first error that a unit's work raised, as it was raised there.
        UnitsLostError: the process of some units died in each of ``ATTEMPTS``; raised after all others are finished.
    """
    if not units:
        return
    if workers.count == 0:
        work = setup()
        for unit in units:
            yield unit, work(unit)
        return
    missing = dict(enumerate(units))
    with start_ray(settings):
        run = _run_actors if workers.reuse_setup else _run_tasks
        for number, outcome in run(setup, units, workers, name):
            if outcome.error is not None:
                raise outcome.error
            yield missing.pop(number), outcome.result
    if missing:
        raise UnitsLostError(list(missing.values()))


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    result: Result
    error: Exception | None = None


Outcomes = Iterator[tuple[int, _Outcome[Any]]]


def _run_tasks(setup: Callable[[], Work[Unit, Result]], units: Sequence[Unit], workers: Workers, name: str) -> Outcomes:
    """One Ray task per unit. Tasks are submitted ahead, so that a worker that has finished one finds the next waiting.

    Ray Data would leave 0.15 s between two tasks of a worker, more than a tar of 100 images takes.
    """
    import ray

    task = ray.remote(_run_once).options(
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus or None,
        max_retries=ATTEMPTS - 1,
        name=name,
        scheduling_strategy="SPREAD",
    )
    setup_ref = ray.put(setup)
    waiting = iter(enumerate(units))
    running: dict[ray.ObjectRef[bytes], int] = {}
    try:
        while True:
            room = max(1, workers.count or 2 * _tasks_at_once(workers)) - len(running)
            for number, unit in islice(waiting, room):
                running[task.remote(setup_ref, pickle.dumps(unit))] = number
            if not running:
                return
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayTaskError:  # of the code around the work: errors of the work are values
                raise
            except ray.exceptions.RayError as error:  # its process died in every attempt
                logger.warning("%s: unit %d: %s", name, number, str(error).strip().partition("\n")[0])
                continue
            yield number, pickle.loads(outcome)
    finally:  # the caller stopped early
        for unfinished in running:
            ray.cancel(unfinished)


def _tasks_at_once(workers: Workers) -> int:
    """Tasks that the cluster has room for now, the first ones of a cluster that grows included."""
    import ray

    there = ray.cluster_resources()
    needs = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    return max(1, int(min(there.get(kind, 0) / need for kind, need in needs.items() if need)))


def _run_actors(
    setup: Callable[[], Work[Unit, Result]], units: Sequence[Unit], workers: Workers, name: str
) -> Outcomes:
    """Ray Data's pool of actors, which grows with the cluster."""
    import ray.data

    with _errored_units_left_out():
        rows = ray.data.from_items(
            [{"number": number, "unit": pickle.dumps(unit)} for number, unit in enumerate(units)],
            override_num_blocks=len(units),
        )
        runner: Any = _Runner  # Ray's types do not know classes here
        done = _map_rows(
            rows,
            runner,
            fn_constructor_args=(setup,),
            compute=ray.data.ActorPoolStrategy(min_size=workers.count or 1, max_size=workers.count),
            max_task_retries=ATTEMPTS - 1,
            num_cpus=workers.num_cpus,
            num_gpus=workers.num_gpus or None,
        )
    done.set_name(name)
    for row in done.iter_rows():
        yield row["number"], pickle.loads(row["outcome"])


@contextmanager
def _errored_units_left_out() -> Iterator[None]:
    """Data sets made in this block leave out what fails. A unit is a block of its own, and we count the results."""
    context = quiet_ray_data()
    before = context.max_errored_blocks
    context.max_errored_blocks = -1
    try:
        yield
    finally:
        context.max_errored_blocks = before


def _map_rows(rows: ray.data.Dataset, function: Any, **options: Any) -> ray.data.Dataset:
    """``rows.map``, without the warning that options of Ray tasks are to become arguments with names of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return rows.map(function, **options)


def _run_once(setup: Callable[[], Work[Any, Any]], unit: bytes) -> bytes:
    return _Runner(setup).run(unit)


class _Runner:
    """Does units of work. Errors travel as values: they arrive without Ray's trace."""

    def __init__(self, setup: Callable[[], Work[Any, Any]]) -> None:
        self._setup = setup
        self._work: Work[Any, Any] | None = None

    def run(self, unit: bytes) -> bytes:
        """A pickled unit to its pickled outcome."""
        try:
            if self._work is None:
                self._work = self._setup()
            return pickle.dumps(_Outcome(self._work(pickle.loads(unit))))
        except Exception as error:
            return _dump_error(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of a Ray data set."""
        return {"number": row["number"], "outcome": self.run(row["unit"])}


def _dump_error(error: Exception) -> bytes:
    """A pickled error outcome; an error that cannot be pickled and built again becomes a ``RuntimeError``."""
    try:
        data = pickle.dumps(_Outcome(None, error))
        pickle.loads(data)
    except Exception:
        return pickle.dumps(_Outcome(None, RuntimeError(f"{type(error).__name__}: {error}")))
    return data
