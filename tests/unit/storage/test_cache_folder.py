"""The cache's folder belongs to one user, and a lock to one process."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading

import pytest

from pipelines.settings import SettingsError
from pipelines.storage import CACHE_VARIABLE, LOCK, alone, default_cache, locked, secure_folder


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert default_cache() == tmp_path / f"t/tinygptv-cache-{os.getuid()}"
    monkeypatch.setenv(CACHE_VARIABLE, "~/kept")
    assert default_cache() == tmp_path / "kept"


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.security
def test_a_folder_that_the_group_or_others_can_write_is_refused(tmp_path, mode):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(SettingsError, match=rf"the cache {folder} .* can be written by others: .*chmod 700 {folder}"):
        secure_folder(folder)
    folder.chmod(0o755)
    assert secure_folder(folder) == folder


@pytest.mark.security
def test_a_new_folder_is_private_and_a_link_is_refused(tmp_path):
    assert secure_folder(tmp_path / "a/cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "a/cache")
    with pytest.raises(SettingsError, match="is a link"):
        secure_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"the cache.* Set TINYGPTV_CACHE to a folder of your own\.$"):
        secure_folder(tmp_path / "file/cache")


@pytest.mark.security
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o700)
    assert secure_folder(tmp_path / "cache") == tmp_path / "cache"
    owner = (tmp_path / "cache").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(SettingsError, match="belongs to another user"):
        secure_folder(tmp_path / "cache")


def test_a_lock_is_refused_while_it_is_held(tmp_path):
    path = tmp_path / "x.lock"
    with locked(path, "busy"), pytest.raises(SettingsError, match=r"^busy$"), locked(path, "busy"):
        pass
    with locked(path, "busy"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_run_has_its_output_folder_alone(tmp_path):
    folder = tmp_path / "made" / "here"
    with alone(str(folder)):
        with pytest.raises(SettingsError, match=f"another run is writing into output='{folder}': wait for it, or"):
            alone(f"file://{folder}").__enter__()
        with alone(str(tmp_path / "made")), alone("memory://bucket/out"), alone("memory://bucket/out"):
            pass
    with alone(str(folder)):
        assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_folder_that_is_replaced_is_locked_by_a_file_beside_it(tmp_path):
    folder, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(folder)
    for order in ((folder, link), (link, folder)):
        first, second = (alone(str(place), is_replaced=True) for place in order)
        with first, pytest.raises(SettingsError, match="another run is writing into"):
            second.__enter__()
    assert not folder.exists() and (tmp_path / f".a{LOCK}").is_file()


def test_a_run_may_wait_for_another_to_end(tmp_path, caplog):
    entered, left = threading.Event(), []

    def other():
        with alone(str(tmp_path), wait=True):
            left.append("other")
            entered.set()

    with alone(str(tmp_path)):
        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        while thread.is_alive() and not caplog.messages:
            assert not entered.wait(0.001)
        left.append("first")
    assert entered.wait(10) and left == ["first", "other"]
    assert caplog.messages == [f"another run is writing into {tmp_path}: waiting for it."]
    thread.join()


def test_a_disk_without_locks_keeps_nobody_from_writing(tmp_path, monkeypatch, caplog):
    """Some network and FUSE file systems have none."""

    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with alone(str(tmp_path)):
        assert f"{tmp_path / LOCK} cannot be locked ([Errno {errno.ENOLCK}] No locks available)" in caplog.text


def test_a_lock_that_waits_tells_the_disks_error_as_it_is(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError("no locks here" if how == fcntl.LOCK_EX else "asked not to wait")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="no locks here"), locked(tmp_path / "x.lock"):
        pass
