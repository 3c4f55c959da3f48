"""What Ray Train calls in each worker.

The controller of a run unpickles this function and its arguments too, so this module imports nothing heavy and the job
travels as bytes: else every run would load the model's libraries once more than it needs.
"""

from __future__ import annotations

import json
import pickle
from typing import Any

WORKER_RESULT = "worker_result.json"
"""What rank 0 hands to the driver, beside the training states."""


def train_worker(config: dict[str, bytes]) -> None:
    """Train this worker's share of ``config["job"]``, a pickled ``job.TrainJob``."""
    import ray.train

    from pipelines import storage
    from pipelines.training.guard import TrainingStopped
    from pipelines.training.job import TrainJob
    from pipelines.training.worker import train_loop

    job: TrainJob = pickle.loads(config["job"])
    result: dict[str, Any]
    try:
        result = train_loop(job)
    except TrainingStopped as stopped:  # trying again would end there again
        result = {"stopped": str(stopped)} if ray.train.get_context().get_world_rank() == 0 else {}
    if result:
        storage.make_folder(job.storage)
        storage.write_atomically(storage.join(job.storage, WORKER_RESULT), json.dumps(result).encode())
    ray.train.report({"steps": result.get("steps", 0)})
