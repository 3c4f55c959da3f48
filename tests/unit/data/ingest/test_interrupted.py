"""An ingest that ends at any moment: the next one gives the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.data.ingest.job import ingest
from tests.ingest_runs import content, settings, write_messy_tars


class Crash(BaseException):
    """A kill: nothing may catch it and continue."""


def crash_at(monkeypatch, number: int) -> list[str]:
    """Let the process die before its ``number``-th visible change on the disk; returns the changes before it."""
    changes: list[str] = []

    def dying(name: str, change):
        def wrapped(*args, **kwargs):
            if len(changes) == number:
                raise Crash
            changes.append(f"{name} {args[0]}")
            return change(*args, **kwargs)

        return wrapped

    for name in ("replace", "hardlink_to", "unlink"):
        monkeypatch.setattr(Path, name, dying(name, getattr(Path, name)))
    for name in ("remove_folder", "remove_file"):
        monkeypatch.setattr(storage, name, dying(name, getattr(storage, name)))
    return changes


def test_a_crash_at_any_change_of_the_disk_does_not_show_in_the_result(tmp_path):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    number, reused = 0, set()
    while True:
        with pytest.MonkeyPatch.context() as patch:
            changes = crash_at(patch, number)
            try:
                ingest(settings(tmp_path, f"crashed-{number}"))
                break
            except Crash:
                assert len(changes) == number
        reused.add(ingest(settings(tmp_path, f"crashed-{number}"))["reused_units"])
        assert content(tmp_path / f"crashed-{number}") == content(tmp_path / "whole"), changes
        assert not (tmp_path / f"crashed-{number}/_staging").exists()
        number += 1
    assert number > 15
    assert reused == {0, 1, 2, 3}


def test_a_crash_never_lets_a_set_pass_for_one_of_other_settings(tmp_path):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    for number in range(40):
        output = f"mixed-{number}"
        shutil.copytree(tmp_path / "whole", tmp_path / output)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Crash):
            crash_at(patch, number)
            ingest(settings(tmp_path, output, min_words=2, overwrite=True))
            break
        ingest(settings(tmp_path, output), replaces_other=True)
        assert content(tmp_path / output) == content(tmp_path / "whole"), number
    assert number > 15


def test_full_disk_is_one_sentence_and_the_run_goes_on_later(tmp_path, monkeypatch):
    write_messy_tars(tmp_path)
    ingest(settings(tmp_path, "whole"))
    written = 0

    def commit(self, original=storage.AtomicFile.commit):
        nonlocal written
        written += 1
        if written == 5:
            with storage.disk_full_as_error(self.location):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(storage.AtomicFile, "commit", commit)
        with pytest.raises(storage.DiskFullError, match=r"no space left .* run the same command again"):
            ingest(settings(tmp_path))
    assert ingest(settings(tmp_path))["reused_units"] == 1
    assert content(tmp_path / "out") == content(tmp_path / "whole")
