"""The function that Ray Train calls in each worker.

The controller of a run unpickles this function and its arguments too. So this module imports nothing heavy, and the job
travels as bytes: otherwise the controller of every run would load the model's libraries.
"""

from __future__ import annotations

import pickle

WORKER_RESULT = "worker_result.json"
"""Result of rank 0 for the driver, beside the training states."""

_REPORTED = {"next_step": "steps", "saved_step": "steps", "loss": "last_loss"}
"""Names of the last report's numbers, as those of states have them -> where a result has them."""


def train_worker(config: dict[str, bytes]) -> None:
    """Train this worker's share of ``config["job"]``, a pickled ``job.TrainJob``."""
    import ray.train

    from pipelines import storage
    from pipelines.json_files import write_json
    from pipelines.settings import SettingsError
    from pipelines.training.guard import TrainingStopped
    from pipelines.training.job import TrainJob
    from pipelines.training.run_reports import RayTrainReports
    from pipelines.training.worker import train_loop

    job: TrainJob = pickle.loads(config["job"])
    outcome: dict[str, object] = {}
    reports = RayTrainReports()
    try:
        result = train_loop(job, reports)
        outcome = dict(result.to_dict()) if result else {}
    except (TrainingStopped, SettingsError, storage.DiskFullError) as error:  # trying again would end there again
        context = ray.train.get_context()
        if not isinstance(error, TrainingStopped) and context.get_world_size() > 1:
            raise  # the other workers do not know of it, and would wait
        if context.get_world_rank() == 0:
            outcome = {"stopped": str(error)}
    if outcome:
        storage.make_folder(job.storage)
        write_json(storage.join(job.storage, WORKER_RESULT), outcome)
    numbers = {name: float(outcome.get(key, 0) or 0) for name, key in _REPORTED.items()}  # type: ignore[arg-type]
    reports.saved(numbers, str(outcome.get("checkpoint", "")))
