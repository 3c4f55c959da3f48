"""One Ray cluster for all integration tests of a session."""

from __future__ import annotations

import os

import pytest

from pipelines.cluster import start_ray
from pipelines.settings import Settings


@pytest.fixture(scope="session")
def ray_cluster():
    """A local cluster of 4 logical CPUs, where Serve's processes have the settings that they have in a server's."""
    from pipelines.serving.run import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with start_ray(Settings(num_cpus=4, object_store_mb=300, quiet=True)):
        yield
