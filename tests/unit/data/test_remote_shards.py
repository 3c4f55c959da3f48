"""Shards of a bucket: fetched when needed, checked, kept in a private cache."""

from __future__ import annotations

import os
import stat
import tempfile

import pytest

from pipelines import storage
from pipelines.data.shard_cache import ShardCache
from pipelines.data.shard_format import Manifest, ShardError
from pipelines.data.shards import ShardSet
from pipelines.settings import SettingsError
from tests.shard_files import make_row, write_set


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "set", [130, 1, 64])


@pytest.fixture
def remote(uri):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("manifest.json", "part-00000.arrow", "part-00001.arrow", "part-00002.arrow"):
        memory.pipe(f"/bucket/set/{name}", storage.read_bytes(f"{uri}/{name}"))
    return "memory://bucket/set"


def test_remote_shards_are_fetched_once_and_only_when_needed(tmp_path, remote, monkeypatch):
    fetched = []
    download = storage.download
    monkeypatch.setattr(
        storage, "download", lambda place, target: (fetched.append(str(place)), download(place, target))
    )
    for _ in range(2):
        shards = ShardSet.open(remote, ShardCache(tmp_path))
        assert [shards.row(k) for k in (131, 194, 140)] == [make_row(k) for k in (131, 194, 140)]
    assert fetched == [f"{remote}/part-00002.arrow"]


def test_a_copy_that_is_used_again_counts_as_new(tmp_path, remote):
    shards = ShardSet.open(remote, ShardCache(tmp_path))
    shards.row(0)
    (copy,) = tmp_path.glob("*.arrow")
    os.utime(copy, (1000, 1000))
    ShardSet.open(remote, ShardCache(tmp_path)).row(1)
    assert copy.stat().st_atime > 1000 == copy.stat().st_mtime


def test_cache_removes_the_least_recently_used(tmp_path, remote, uri):
    sizes = {info.file: info.bytes for info in Manifest.read(uri).shards}
    cache = ShardCache(tmp_path, max_bytes=sizes["part-00000.arrow"] + sizes["part-00001.arrow"])
    shards = ShardSet.open(remote, cache)
    shards.rows([0, 130])
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    first = tmp_path / f"{shards.manifest.shards[0].sha256}.arrow"
    os.utime(first, (1, 1))
    shards.row(194)
    kept = {path.stem for path in tmp_path.glob("*.arrow")}
    assert kept == {shards.manifest.shards[1].sha256, shards.manifest.shards[2].sha256}
    assert shards.row(0) == make_row(0), "an open shard outlives its removal"


def test_download_that_does_not_match_is_refused(tmp_path, remote):
    import fsspec

    memory = fsspec.filesystem("memory")
    data = bytearray(memory.cat("/bucket/set/part-00001.arrow"))
    data[40] ^= 255
    memory.pipe("/bucket/set/part-00001.arrow", bytes(data))
    with pytest.raises(ShardError, match="does not match the manifest"):
        ShardSet.open(remote, ShardCache(tmp_path)).row(130)
    assert {path.suffix for path in tmp_path.glob("*")} == {".lock"}


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.security
def test_the_cache_is_a_private_folder(tmp_path, remote, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TINYGPTV_CACHE", raising=False)
    cache = ShardCache()
    ShardSet.open(remote, cache).row(0)
    assert cache.folder == tmp_path / f"tinygptv-cache-{os.getuid()}"
    assert mode_of(cache.folder) == 0o700
    assert {mode_of(path) for path in cache.folder.iterdir()} == {0o600}


@pytest.mark.security
@pytest.mark.parametrize("trap", ["others write", "link"])
def test_a_cache_into_which_others_could_put_files_is_refused(tmp_path, remote, trap):
    folder = tmp_path / "cache"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(SettingsError, match=r"can be written by others: set TINYGPTV_CACHE"):
        ShardSet.open(remote, ShardCache(folder)).row(0)


@pytest.mark.security
def test_a_copy_with_another_content_is_fetched_again(tmp_path, remote):
    info = Manifest.read(remote).shards[1]
    planted = tmp_path / f"{info.sha256}.arrow"
    planted.write_bytes(b"planted")
    shards = ShardSet.open(remote, ShardCache(tmp_path))
    assert shards.row(130) == make_row(130)
    assert planted.stat().st_size == info.bytes
