"""Independent units of work, in this process or on Ray Data: results as they finish.

A unit is a small picklable description: which file, which rows. Its work writes its own output, so nothing large
travels between processes, and whoever calls passes only those units whose output is not there yet.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.cluster import quiet_ray_data, start_ray
from pipelines.settings import Settings

if TYPE_CHECKING:
    import ray.data

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Work = Callable[[Unit], Result]

ATTEMPTS = 4
"""Runs of a unit whose process dies. Ray Data's own default has no bound: one unit could stall a job for ever."""

_GROUP_BYTES = 64 * 2**20
"""Small units are done together up to so many bytes: Ray Data takes about 0.15 s to follow a task by the next."""

_GROUPS_PER_WORKER = 4
"""Fewer would leave workers idle at the end."""


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
    with _errored_units_left_out():
        rows = ray.data.from_items(
            [{"numbers": list(group), "units": [pickle.dumps(units[n]) for n in group]} for group in groups],
            override_num_blocks=len(groups),
        )
        if workers.reuse_setup:
            pool = ray.data.ActorPoolStrategy(min_size=workers.count or 1, max_size=workers.count)
            runner: Any = _Runner  # Ray's types do not know classes here
            done = _map_rows(
                rows, runner, fn_constructor_args=(setup,), compute=pool, max_task_retries=retries, **resources
            )
        else:
            tasks = ray.data.TaskPoolStrategy(size=workers.count)
            done = _map_rows(rows, partial(_run_once, setup), compute=tasks, max_retries=retries, **resources)
    done.set_name(name)
    outcomes = iter(done.iter_rows())
    with _all_workers_at_once():
        first = list(islice(outcomes, 1))
    for row in chain(first, outcomes):
        yield from zip(row["numbers"], map(pickle.loads, row["outcomes"]), strict=True)


@contextmanager
def _errored_units_left_out() -> Iterator[None]:
    """Data sets made in this block leave out what fails. A unit is counted by its result."""
    context = quiet_ray_data()
    before = context.max_errored_blocks
    context.max_errored_blocks = -1
    try:
        yield
    finally:
        context.max_errored_blocks = before


@contextmanager
def _all_workers_at_once() -> Iterator[None]:
    """Ray Data looks at the cluster's size once per second, the first time before it is known: until then it runs one
    task at a time. In this block, which waits for the first result, it looks more often."""
    from ray.data._internal.execution.resource_manager import ResourceManager

    before = getattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", None)
    if before is None:  # another release of Ray: nothing to change
        yield
        return
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.05  # type: ignore[assignment]  # an int by its default
    try:
        yield
    finally:
        ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = before


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
