"""What Ray Train is to do at a failed worker besides starting all of them again: tell it, and know when to stop.

Ray Train calls this in the controller of a run, a process of its own, as it does ``ray_entry``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray.exceptions import RayActorError
from ray.train import Checkpoint, TrainingFailedError, UserCallback
from ray.train.v2.api.exceptions import RayTrainError

from pipelines import storage
from pipelines.progress import poll
from pipelines.redact import one_line

logger = logging.getLogger(__name__)

FAILURES_FILE = "failures.txt"
"""One line per failure, beside the training states: the controller writes it, the driver tells it."""

_TRIES = 5
_START_AGAIN = "start again from the newest training state"


class WorkerFailures(UserCallback):
    """Writes down each failure, and ends a training whose own errors repeat.

    ``max_failures`` is meant for machines that are lost, of which there may be any number. An error of the training
    itself (a full disk, a GPU without memory) comes back with every start.
    """

    def __init__(self, location: str, max_failures: int = -1) -> None:
        """Begin a run.

        Args:
            location: of its training states.
            max_failures: restarts that Ray Train makes; -1 is without bound.
        """
        self.path = storage.join(location, FAILURES_FILE)
        self.max_failures = max_failures
        self._lines: list[str] = []
        self._furthest = -1.0
        self._in_vain = 0

    def after_report(self, run_context: object, metrics: list[dict[str, float]], checkpoint: Checkpoint | None) -> None:
        """Note how far the run has come."""
        step = max(each["next_step"] for each in metrics)
        if step > self._furthest:
            self._furthest, self._in_vain = step, 0

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Write down a failure.

        Raises:
            ValueError: errors of the training itself repeat with no new training state between them, or a worker was
                lost once more than ``max_failures``.
        """
        lost = sorted(rank for rank, error in worker_exceptions.items() if _is_lost(error))
        self._in_vain = 0 if lost else self._in_vain + 1
        rank = lost[0] if lost else min(worker_exceptions)
        error = worker_exceptions[rank]
        what = f"worker {rank} " + ("was lost" if lost else f"failed: {type(error).__name__}: {one_line(error, 500)}")
        if self._in_vain == _TRIES:
            raise ValueError(
                f"training ended, because {_TRIES} starts failed without a new training state between them: {what}"
            )
        is_last = len(self._lines) == self.max_failures
        if is_last and lost:
            raise ValueError(
                f"training ended, because {what}, and the restarts of max_failures={self.max_failures} are used up: "
                "the same command resumes from the newest training state."
            )
        self._lines.append(f"{what.rstrip('.')}; the workers " + ("end" if is_last else _START_AGAIN))
        with suppress(OSError, storage.DiskFullError):  # perhaps the very reason
            storage.write_atomically(self.path, "".join(f"{line}\n" for line in self._lines).encode())


def _is_lost(error: Exception) -> bool:
    """Whether a process or its machine is gone, rather than the training's code having raised something."""
    return isinstance(error, RayTrainError | RayActorError)


def cause_of(error: TrainingFailedError | RayActorError) -> Exception:
    """Why a run ended, as one sentence: a mistake of the user's that a worker met, or a process that was lost.

    Ray's own error where there is none, with a note on what to do.
    """
    from pipelines.training.guard import TrainingStopped  # heavy

    if isinstance(error, RayActorError):
        return TrainingStopped(
            f"the process that leads the training was lost, perhaps with its node ({one_line(error)}): "
            "the same command resumes from the newest training state."
        )
    for failure in getattr(error, "worker_failures", {0: getattr(error, "controller_failure", None)}).values():
        cause: BaseException | None = failure
        while cause is not None and not isinstance(cause, ValueError):
            cause = getattr(cause, "_base_exc", None) or cause.__cause__
        if cause is not None:
            return TrainingStopped(str(cause))
    error.add_note(
        "The same command resumes from the newest training state. Whole traces: logs/train in Ray's session folder "
        "(/tmp/ray/session_latest) of each node."
    )
    return error


@contextmanager
def told_failures(location: str) -> Iterator[None]:
    """Tell each failure of a run's workers in the driver's log while the block runs.

    Args:
        location: of the training states.
    """
    path = storage.join(location, FAILURES_FILE)
    storage.remove_file(path)
    num_told = 0

    def tell() -> None:
        nonlocal num_told
        with suppress(OSError):
            lines = storage.read_bytes(path).decode(errors="replace").splitlines()
            for line in lines[num_told:]:
                logger.warning("%s", line)
            num_told = len(lines)

    with poll(tell, every_s=2.0 if storage.is_local(location) else 30.0):
        yield
