"""A small model behind the HTTP API, one for each file of tests."""

from __future__ import annotations

import pytest

from pipelines.serving.model_backend import ModelBackend
from pipelines.settings import ServeSettings
from tests.serving_api import Client
from tests.serving_model import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def backend(checkpoint):
    backend = ModelBackend(ServeSettings(artifact=str(checkpoint), max_batch_size=4))
    yield backend
    backend.assistant.close()


@pytest.fixture(scope="module")
def client(backend):
    return Client(backend)
