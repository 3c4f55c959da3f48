"""One Ray cluster for all integration tests of a session."""

from __future__ import annotations

import pytest

from pipelines.cluster import start_ray
from pipelines.settings import Settings


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster of 4 logical CPUs."""
    with start_ray(Settings(num_cpus=4, object_store_mb=300, quiet=True)):
        yield
