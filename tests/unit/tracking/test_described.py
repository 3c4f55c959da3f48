"""What a run says of itself: where its code is from, what it computes on, and which run it is."""

from __future__ import annotations

import json
import math
import subprocess
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from pipelines.tracking import described
from pipelines.tracking.described import hardware_tags, markdown_table, run_title, source_tags
from pipelines.tracking.identity import RUN_FILE, RunIdentity, read_identity, write_identity


def test_the_source_is_the_script_its_commit_and_its_user(monkeypatch):
    monkeypatch.setattr(described.sys, "argv", ["/project/jobs/stage1.py", "data=x"])
    commit = "25d9904e723d6c75a62ec69da57f9494afa9a823"
    monkeypatch.setattr(described, "_git_commit", lambda: commit)
    monkeypatch.setattr(described.getpass, "getuser", lambda: "me")
    known = {"mlflow.source.name": "stage1.py", "mlflow.source.type": "LOCAL"}
    assert source_tags() == {**known, "mlflow.source.git.commit": commit, "mlflow.user": "me"}
    monkeypatch.setattr(described, "_git_commit", lambda: "")
    for error in (KeyError("no user"), OSError("no user")):  # Python 3.13 and later raise the other one
        monkeypatch.setattr(described.getpass, "getuser", Mock(side_effect=error))
        assert source_tags() == known


@pytest.mark.parametrize("error", [None, OSError("no git"), subprocess.TimeoutExpired("git", 5)])
def test_the_commit_is_that_of_the_projects_folder(monkeypatch, error):
    asked = []

    def run(command, **options):
        asked.append((command, options))
        if error:
            raise error
        return SimpleNamespace(stdout="abc\n")

    monkeypatch.setattr(described.subprocess, "run", run)
    assert described._git_commit.__wrapped__() == ("" if error else "abc")
    options = {"capture_output": True, "text": True, "timeout": 5, "check": True}
    assert asked == [(["git", "-C", str(described.ROOT), "rev-parse", "HEAD"], options)]


def test_hardware_is_in_gigabytes(monkeypatch):
    card = SimpleNamespace(name="H100", total_memory=80e9)
    monkeypatch.setattr(described.psutil, "virtual_memory", lambda: SimpleNamespace(total=64.4e9))
    monkeypatch.setattr(described.os, "cpu_count", lambda: 12)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    known = {"hardware.workers": "3", "hardware.cpus": "12", "hardware.memory_gb": "64"}
    known["hardware.torch"] = str(torch.__version__)
    assert hardware_tags(3) == known
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card if device == 1 else None)
    assert hardware_tags(3) == {**known, "hardware.gpu": "H100", "hardware.gpu_memory_gb": "80"}


def test_a_title_has_the_local_time_of_the_start(monkeypatch):
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            assert run_title("paper", "stage 2", 0.0) == "paper stage 2, 1970-01-01 09:00"
            patch.setattr(
                described,
                "time",
                SimpleNamespace(
                    strftime=time.strftime, localtime=lambda started: time.localtime(3600.0 if started is None else 0.0)
                ),
            )
            assert run_title("mini", "ablation") == "mini ablation, 1970-01-01 10:00", "of now"
    finally:
        time.tzset()


def test_a_table_has_a_column_for_every_key_and_one_line_for_every_row():
    rows = [{"a": 1 / 3, "b": "x\n  y|z"}, {"b": None, "c": True, "d": 12345}, {"a": 2.0, "d": math.nan}]
    assert markdown_table(rows).split("\n") == [
        "| a&emsp; | b&emsp; | c&emsp; | d |",
        "| --- | --- | --- | --- |",
        "| 0.3333&emsp; | x y\\|z&emsp; | &emsp; |  |",
        "| &emsp; | &emsp; | True&emsp; | 12345 |",
        "| 2&emsp; | &emsp; | &emsp; | nan |",
    ]
    assert markdown_table([{"only": 123456.7}]) == "| only |\n| --- |\n| 1.235e+05 |"


def test_an_identity_is_what_its_file_says(tmp_path):
    known = RunIdentity("r1", "k1", "p1")
    write_identity(tmp_path, known)
    assert read_identity(tmp_path) == known
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"run_id": "r1", "key": "k1", "parent": "p1"}
    (tmp_path / RUN_FILE).write_text('{"key": 7, "more": 1}')
    assert read_identity(tmp_path) == RunIdentity("", "7", "")
    assert read_identity(tmp_path / "none") is None
