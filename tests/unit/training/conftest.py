"""Data, a start and a finished run that the tests of training share; none of them changes these."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from pipelines.miniature.tiny_training import make_world, train_settings
from pipelines.tracking import described
from pipelines.training.run import run_stage


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(world, tmp_path_factory):
    """An uninterrupted run: its result and its folder."""
    output = tmp_path_factory.mktemp("straight")
    return run_stage(train_settings(world, output), 4), output


@pytest.fixture
def still_titles(monkeypatch):
    """Names of runs that begin now have one time, also over the end of a minute."""
    clock = SimpleNamespace(strftime=time.strftime, localtime=lambda started: time.localtime(started or 7.0))
    monkeypatch.setattr(described, "time", clock)
