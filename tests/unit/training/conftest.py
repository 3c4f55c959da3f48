"""Data, a start and a finished run that the tests of training share; none of them changes these."""

from __future__ import annotations

import pytest

from pipelines.miniature.tiny_training import make_world, train_settings
from pipelines.training.run import run_stage


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(world, tmp_path_factory):
    """An uninterrupted run: its result and its folder."""
    output = tmp_path_factory.mktemp("straight")
    return run_stage(train_settings(world, output), 4), output
