"""One Ray cluster for all integration tests of a session."""

from __future__ import annotations

import os

import pytest

from pipelines.cluster import ENVIRONMENT


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster of 4 logical CPUs."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ray.init(address="local", num_cpus=4, object_store_memory=300 * 2**20, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()
