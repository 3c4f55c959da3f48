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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.cluster import check_resources, quiet_ray_data, start_ray
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
        for groups, retries in _attempts(units, workers, num_bytes):
            left = [[number for number in group if number in missing] for group in groups]
            for number, outcome in _run_on_ray(
                setup, units, [group for group in left if group], workers, name, retries
            ):
                if outcome.error is not None:
                    raise outcome.error
                yield missing.pop(number), outcome.result
    if missing:
        raise UnitsLostError(list(missing.values()))


def _attempts(
    units: Sequence[Unit], workers: Workers, num_bytes: Callable[[Unit], int] | None
) -> Iterator[tuple[list[list[int]], int]]:
    """Groups of units, and how often one is repeated whose process dies: it may take sound units with it, so what a
    group has lost is done again one by one."""
    alone = groups = [[number] for number in range(len(units))]
    if num_bytes is not None:
        most = len(units) // (_GROUPS_PER_WORKER * (workers.count or _room(workers)))
        groups = _groups([num_bytes(unit) for unit in units], most)
    if groups == alone:
        yield alone, ATTEMPTS - 1
    else:
        yield groups, 0
        yield alone, ATTEMPTS - 2


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
    groups: Sequence[Sequence[int]],
    workers: Workers,
    name: str,
    retries: int,
) -> Iterator[tuple[int, _Outcome[Any]]]:
    import ray.data

    if not groups:
        return
    resources: dict[str, Any] = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus or None}
    with _data_context(workers):
        rows = ray.data.from_items(
            [{"numbers": list(group), "units": [pickle.dumps(units[n]) for n in group]} for group in groups],
            override_num_blocks=len(groups),
        )
        if workers.reuse_setup:
            # An actor without a unit would be set up for nothing.
            most = min(workers.count, len(groups)) if workers.count else None
            pool = ray.data.ActorPoolStrategy(min_size=most or 1, max_size=most)
            runner: Any = _Runner  # Ray's types do not know classes here
            done = _map_rows(
                rows, runner, fn_constructor_args=(setup,), compute=pool, max_task_retries=retries, **resources
            )
        else:
            tasks = ray.data.TaskPoolStrategy(size=workers.count)
            done = _map_rows(rows, partial(_run_once, setup), compute=tasks, max_retries=retries, **resources)
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

    A backpressure policy of Ray Data by its methods.
    """

    name = "TasksAhead"

    def __init__(self, workers: Workers, *_: Any) -> None:
        self._workers = workers
        self._most = 0
        self._until = 0.0

    def can_add_input(self, op: Any) -> bool:
        if time.monotonic() >= self._until:  # clusters grow
            most = _TASKS_PER_WORKER * _room(self._workers)
            self._most = min(most, self._workers.count or most)
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
