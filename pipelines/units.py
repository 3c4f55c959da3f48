"""Independent units of work, in this process or on Ray Data: results as they finish.

A unit is a small picklable description: which file, which rows. Its work writes its own output, so nothing large
travels between processes, and whoever calls passes only those units whose output is not there yet.
"""

from __future__ import annotations

import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.cluster import check_resources, quiet_ray_data, start_ray, worker_share
from pipelines.settings import Settings

if TYPE_CHECKING:
    import ray.data

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Work = Callable[[Unit], Result]

ATTEMPTS = 4
"""Runs of a unit whose process dies. Ray Data's own default has no bound: one unit could stall a job for ever."""

_GROUP_BYTES = 64 * 2**20
"""Small units are done together up to so many bytes."""

_GROUPS_PER_WORKER = 4
"""Fewer would leave workers idle at the end."""

_TASKS_PER_WORKER = 4
"""Tasks submitted, those that run included: a worker that has finished one finds the next."""

_POLICIES = "backpressure_policies.enabled"
"""Ray Data's setting (``DataContext.set_config``): what decides about one more task."""


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
    setup: Callable[[], Work[Unit, Result]],
    units: Sequence[Unit],
    workers: Workers,
    settings: Settings,
    *,
    name: str,
    num_bytes: Callable[[Unit], int] | None = None,
) -> Iterator[tuple[Unit, Result]]:
    """Run every unit once.

    Args:
        setup: makes the function that does a unit's work, in the process that will call it; picklable.
        units: what is to be done; picklable.
        workers: where and how many at a time.
        settings: of the cluster to join or start.
        name: of the work, in Ray's dashboard.
        num_bytes: size of a unit's input. Small ones are then handed out several at a time.

    Yields:
        Units with their results, in the order in which they finish.

    Raises:
        Exception: the first error that a unit's work raised, as it was raised there.
        SettingsError: a local cluster has no room for a single worker.
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
        check_resources({"CPU": workers.num_cpus, "GPU": workers.num_gpus}, f"a worker of {name}")
        for attempt in _attempts(units, workers, num_bytes):
            groups = [[number for number in group if number in missing] for group in attempt.groups]
            left = replace(attempt, groups=[group for group in groups if group])
            for number, outcome in _run_on_ray(setup, units, left, workers, name):
                if outcome.error is not None:
                    raise outcome.error
                yield missing.pop(number), outcome.result
    if missing:
        raise UnitsLostError(list(missing.values()))


@dataclass(frozen=True)
class _Attempt:
    """One pass over units that have no result yet.

    Attributes:
        groups: numbers of the units that are done together.
        retries: repetitions of a group whose process dies.
        one_by_one: hand a worker its next group when the result of its last has arrived.
    """

    groups: Sequence[Sequence[int]]
    retries: int
    one_by_one: bool = False


def _attempts(units: Sequence[Unit], workers: Workers, num_bytes: Callable[[Unit], int] | None) -> Iterator[_Attempt]:
    """Passes over the units, ``ATTEMPTS`` runs of each in all.

    A process that dies takes sound units with it: those of its group, and as an actor those sent ahead or whose result
    was still on its way. What the first pass has lost is done again one by one.
    """
    alone = groups = [[number] for number in range(len(units))]
    if num_bytes is not None:
        most = len(units) // (_GROUPS_PER_WORKER * (workers.count or _room(workers)))
        groups = _groups([num_bytes(unit) for unit in units], most)
    if groups == alone and not workers.reuse_setup:
        yield _Attempt(alone, ATTEMPTS - 1)
        return
    # What may be repeated waits for an actor that restarts; the rest would fail at once.
    retries = 1 if workers.reuse_setup else 0
    yield _Attempt(groups, retries)
    yield _Attempt(alone, ATTEMPTS - 2 - retries, one_by_one=True)


def _groups(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive numbers, at most ``most`` together, until their sizes reach ``_GROUP_BYTES``."""
    groups: list[list[int]] = []
    total = _GROUP_BYTES
    for number, size in enumerate(sizes):
        if total >= _GROUP_BYTES or len(groups[-1]) >= most:
            groups.append([])
            total = 0
        groups[-1].append(number)
        total += size
    return groups


def _room(workers: Workers) -> int:
    """Workers that the cluster has room for now, the first one of a cluster that grows included."""
    import ray

    there = ray.cluster_resources()
    needs = {"CPU": workers.num_cpus, "GPU": workers.num_gpus}
    return max(1, int(min(there.get(kind, 0) / need for kind, need in needs.items() if need)))


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    result: Result
    error: Exception | None = None


def _run_on_ray(
    setup: Callable[[], Work[Unit, Result]],
    units: Sequence[Unit],
    attempt: _Attempt,
    workers: Workers,
    name: str,
) -> Iterator[tuple[int, _Outcome[Any]]]:
    import ray.data

    groups = attempt.groups
    if not groups:
        return
    options: dict[str, Any] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus or None}
    if workers.count and not workers.reuse_setup and (share := worker_share(workers.count)):
        options["resources"] = share
    with _data_context(workers):
        rows = ray.data.from_items(
            [{"numbers": list(group), "units": [pickle.dumps(units[n]) for n in group]} for group in groups],
            override_num_blocks=len(groups),
        )
        if workers.reuse_setup:
            # An actor without a unit would be set up for nothing.
            most = min(workers.count, len(groups)) if workers.count else None
            ahead = 1 if attempt.one_by_one else None
            options["max_task_retries"] = attempt.retries
            pool = ray.data.ActorPoolStrategy(min_size=most or 1, max_size=most, max_tasks_in_flight_per_actor=ahead)
            runner: Any = _Runner  # Ray's types do not know classes here
            done = _map_rows(rows, runner, fn_constructor_args=(setup,), compute=pool, **options)
        else:
            tasks = ray.data.TaskPoolStrategy()  # the policy bounds them
            done = _map_rows(rows, partial(_run_once, setup), compute=tasks, max_retries=attempt.retries, **options)
    done.set_name(name)
    for row in done.iter_rows():
        yield from zip(row["numbers"], map(pickle.loads, row["outcomes"]), strict=True)


@contextmanager
def _data_context(workers: Workers) -> Iterator[None]:
    """Settings of the data sets made in this block.

    They leave out what fails: a unit is counted by its result. Tasks are submitted ahead: Ray Data's own policy submits
    one only when it has seen another's end, 0.15 s later, and starts with one until it knows the cluster's size.
    """
    context = quiet_ray_data()
    failures, reservation = context.max_errored_blocks, context.op_resource_reservation_enabled
    context.max_errored_blocks = -1
    if not workers.reuse_setup:
        context.op_resource_reservation_enabled = False
        context.set_config(_POLICIES, [partial(_TasksAhead, workers)])
    try:
        yield
    finally:
        context.max_errored_blocks, context.op_resource_reservation_enabled = failures, reservation
        context.remove_config(_POLICIES)


class _TasksAhead:
    """Decides for Ray Data whether one more task is submitted; Ray runs as many as the cluster has room for.

    Where Ray does not know the bound on the workers (``worker_share``), no more are submitted than may run at a time. A
    backpressure policy of Ray Data by its methods.
    """

    name = "TasksAhead"

    def __init__(self, workers: Workers, *_: Any) -> None:
        self._workers = workers
        self._most = 0
        self._until = 0.0

    def can_add_input(self, op: Any) -> bool:
        if time.monotonic() >= self._until:  # clusters grow
            room, count = _room(self._workers), self._workers.count
            if count and not worker_share(count):
                self._most = min(_TASKS_PER_WORKER * room, count)
            else:
                self._most = _TASKS_PER_WORKER * min(room, count or room)
            self._until = time.monotonic() + 1
        return bool(op.num_active_tasks() < self._most)

    def max_task_output_bytes_to_read(self, op: Any) -> None:
        """Outputs are small: no limit."""


def _map_rows(rows: ray.data.Dataset, function: Any, **options: Any) -> ray.data.Dataset:
    """``rows.map``, without the warning that options of Ray tasks are to become arguments with names of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return rows.map(function, **options)


def _run_once(setup: Callable[[], Work[Any, Any]], row: dict[str, Any]) -> dict[str, Any]:
    return _Runner(setup)(row)


class _Runner:
    """Does units that arrive as rows of a Ray data set. Errors travel as values: they arrive without Ray's trace."""

    def __init__(self, setup: Callable[[], Work[Any, Any]]) -> None:
        self._setup = setup
        self._work: Work[Any, Any] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"numbers": row["numbers"], "outcomes": [self._run(unit) for unit in row["units"]]}

    def _run(self, unit: bytes) -> bytes:
        try:
            if self._work is None:
                self._work = self._setup()
            return pickle.dumps(_Outcome(self._work(pickle.loads(unit))))
        except Exception as error:
            return _dump_error(error)


def _dump_error(error: Exception) -> bytes:
    """A pickled error outcome; an error that cannot be pickled and built again becomes a ``RuntimeError``."""
    try:
        data = pickle.dumps(_Outcome(None, error))
        pickle.loads(data)
    except Exception:
        return pickle.dumps(_Outcome(None, RuntimeError(f"{type(error).__name__}: {error}")))
    return data
