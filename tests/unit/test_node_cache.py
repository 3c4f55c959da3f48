"""Checkpoints of a bucket on a node: one download for all processes, never half a copy, one sentence per mistake."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import pytest

from pipelines import node_cache, storage
from pipelines.fingerprint import checkpoint_digest
from pipelines.node_cache import local_checkpoint
from pipelines.settings import SettingsError
from tinygptv.checkpoint.folders import MANIFEST, CheckpointError, verify_folder, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYGPTV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/checkpoints"


def checkpoint(folder, content=b"weights"):
    def fill(staging):
        (staging / "model.safetensors").write_bytes(content)
        (staging / "config.json").write_text("{}")
        (staging / "tokenizer").mkdir()
        (staging / "tokenizer/words.txt").write_text("a b")

    return write_folder(folder, fill)


@pytest.fixture
def remote(tmp_path):
    place = f"memory://bucket/{tmp_path.name}/start"
    storage.upload_folder(checkpoint(tmp_path / "made"), place, MANIFEST)
    return place


def downloads(monkeypatch):
    names = []
    original = storage.download_files

    def counting(source, wanted, target):
        names.extend(wanted)
        return original(source, wanted, target)

    monkeypatch.setattr(storage, "download_files", counting)
    return names


def test_a_local_folder_is_itself(tmp_path):
    folder = checkpoint(tmp_path / "made")
    assert local_checkpoint(str(folder)) == local_checkpoint(f"file://{folder}") == folder


def test_a_remote_one_is_fetched_once(remote, monkeypatch):
    fetched = downloads(monkeypatch)
    first = local_checkpoint(remote)
    assert local_checkpoint(remote) == first and len(fetched) == 3
    verify_folder(first)
    assert (first / "tokenizer/words.txt").read_text() == "a b"


def test_without_weights_little_is_fetched(remote, monkeypatch, tmp_path):
    fetched = downloads(monkeypatch)
    light = local_checkpoint(remote, weights=False)
    assert "model.safetensors" not in fetched and not (light / "model.safetensors").exists()
    assert checkpoint_digest(light) == checkpoint_digest(tmp_path / "made"), "results are known by the whole manifest"
    whole = local_checkpoint(remote)
    assert whole != light and (whole / "model.safetensors").is_file()
    assert local_checkpoint(remote, weights=False) == whole


def test_every_kind_of_weights_is_left_out_and_a_light_copy_that_is_used_stays(tmp_path):
    names = ["a.safetensors", "b.bin", "c.pt", "d.npy", "deep/e.safetensors", "f.json", "g.txt"]

    def fill(staging):
        (staging / "deep").mkdir()
        for name in names:
            (staging / name).write_text(name)

    place = f"memory://bucket/{tmp_path.name}/kinds"
    storage.upload_folder(write_folder(tmp_path / "made", fill), place, MANIFEST)
    light = local_checkpoint(place, weights=False)
    assert {path.name for path in light.rglob("*") if path.is_file()} == {"f.json", "g.txt", MANIFEST}
    os.utime(light, (1000, 1000))
    assert local_checkpoint(place, weights=False) == light and light.stat().st_mtime > 1000


def test_a_storage_that_refuses_is_told_before_what_is_missing(tmp_path, monkeypatch):
    def refused(location):
        raise storage.StorageError(f"{location} refuses access")

    monkeypatch.setattr(storage, "check_access", refused)
    for fetch in (local_checkpoint, node_cache.local_data):
        with pytest.raises(storage.StorageError, match=r"^memory://refused/x refuses access$"):
            fetch("memory://refused/x")


def test_the_hub_has_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(node_cache, "local_folder", lambda location: tmp_path / location.rpartition("/")[2])
    assert local_checkpoint("hf://org/name@v1") == tmp_path / "name@v1"


def test_a_start_that_changed_is_another_copy(remote, tmp_path):
    first = local_checkpoint(remote)
    storage.upload_folder(checkpoint(tmp_path / "other", b"other weights"), remote, MANIFEST)
    second = local_checkpoint(remote)
    assert second != first and (second / "model.safetensors").read_bytes() == b"other weights"
    assert (first / "model.safetensors").read_bytes() == b"weights", "who has it open keeps it"


def test_processes_wait_for_one_download(remote, monkeypatch, tmp_path):
    """Forked processes share the memory file system's content and the lock, not what happened since."""
    log = tmp_path / "log"
    original, locked = storage.download_files, storage.locked
    fork = multiprocessing.get_context("fork")
    came = fork.Value("i", 0)

    def lock(path):
        with came.get_lock():
            came.value += 1
        return locked(path)

    def slow(source, wanted, target):
        with log.open("a") as file:
            file.write("download\n")
        deadline = time.monotonic() + 60
        while came.value < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        return original(source, wanted, target)

    monkeypatch.setattr(storage, "locked", lock)
    monkeypatch.setattr(storage, "download_files", slow)
    processes = [fork.Process(target=local_checkpoint, args=(remote,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text().splitlines() == ["download"]


def test_half_a_download_is_never_used(remote, monkeypatch, cache):
    def killed(source, wanted, target):
        storage.download(storage.Location.parse(remote) / "config.json", target / "config.json")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "download_files", killed)
        local_checkpoint(remote)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
    verify_folder(local_checkpoint(remote))


def test_a_copy_that_lost_its_manifest_is_fetched_again(remote):
    folder = local_checkpoint(remote)
    (folder / MANIFEST).unlink()
    (folder / "left").touch()
    assert local_checkpoint(remote) == folder and not (folder / "left").exists()
    verify_folder(folder)


def test_what_is_still_being_written_is_told(remote, tmp_path):
    storage.remove_file(storage.join(remote, MANIFEST))
    with pytest.raises(CheckpointError, match=rf"{remote} has files but no manifest.json.* still writing it"):
        local_checkpoint(remote)
    with pytest.raises(CheckpointError, match=r"checkpoint memory://bucket/nowhere does not exist"):
        local_checkpoint("memory://bucket/nowhere")


def test_what_changes_while_it_is_copied_is_told(remote):
    storage.write_atomically(storage.join(remote, "model.safetensors"), b"WEIGHTS")
    with pytest.raises(CheckpointError, match=r"memory://.*model.safetensors does not match .* another job writing it"):
        local_checkpoint(remote)


def test_a_manifest_does_not_lead_out_of_the_cache(remote, cache):
    storage.write_atomically(storage.join(remote, MANIFEST), b'{"files": {"../../x": {"bytes": 1, "sha256": ""}}}')
    with pytest.raises((CheckpointError, ValueError)):
        local_checkpoint(remote)
    assert not (cache.parent / "x").exists()


def test_few_copies_are_kept(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(node_cache, "MAX_FOLDERS", 2)
    for number in range(4):
        place = f"memory://bucket/{tmp_path.name}/{number}"
        storage.upload_folder(checkpoint(tmp_path / str(number), bytes([number])), place, MANIFEST)
        newest = local_checkpoint(place)
    copies = [path for path in cache.iterdir() if path.is_dir()]
    assert len(copies) == 2 and newest in copies


def test_the_copy_that_was_used_longest_ago_is_removed(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(node_cache, "MAX_FOLDERS", 2)
    remote = [f"memory://bucket/{tmp_path.name}/{number}" for number in range(3)]
    for number, location in enumerate(remote):
        storage.upload_folder(checkpoint(tmp_path / str(number), bytes([number])), location, MANIFEST)
    first, second = local_checkpoint(remote[0]), local_checkpoint(remote[1])
    os.utime(first, (1000, 1000)), os.utime(second, (2000, 2000))
    assert local_checkpoint(remote[0]) == first, "used again"
    third = local_checkpoint(remote[2])
    assert {path for path in cache.iterdir() if path.is_dir()} == {first, third}


def test_data_is_copied_once_with_its_times_and_again_when_a_file_changed(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    place = f"memory://bucket/{tmp_path.name}/data"
    for name in ("a.json", "deep/b.json"):
        storage.write_atomically(f"{place}/{name}", name.encode())
    storage.write_atomically(f"{place}/large", bytes(300_000))
    fetched = downloads(monkeypatch)
    first = node_cache.local_data(place)
    assert caplog.messages == [f"fetching 3 files of {place} (0.3 MB)"]
    assert node_cache.local_data(place) == first and sorted(fetched) == ["a.json", "deep/b.json", "large"]
    assert (first / "deep/b.json").read_bytes() == b"deep/b.json"
    times = {file.name: file.modified_ns for file in storage.find_below(place)}
    assert all((first / name).stat().st_mtime_ns // 1000 == changed // 1000 for name, changed in times.items())
    alone = node_cache.local_data(f"{place}/a.json")
    assert (alone.name, alone.read_bytes()) == ("a.json", b"a.json")
    storage.write_atomically(f"{place}/a.json", b"another")
    second = node_cache.local_data(place)
    assert second != first and (second / "a.json").read_bytes() == b"another"
    assert node_cache.local_data(str(tmp_path)) == tmp_path
    with pytest.raises(SettingsError, match="holds no files: check the URI"):
        node_cache.local_data(f"memory://bucket/{tmp_path.name}/none")


def test_data_keeps_each_files_time_and_half_of_it_is_not_kept(tmp_path, monkeypatch):
    place, find = f"memory://bucket/{tmp_path.name}/times", storage.find_below
    times = {"a": 1_700_000_000_123_456_789, "deep/b": 1_600_000_000_000_000_001}
    for name in times:
        storage.write_atomically(f"{place}/{name}", name.encode())
    monkeypatch.setattr(
        storage, "find_below", lambda at: [replace(file, modified_ns=times[file.name]) for file in find(at)]
    )

    def killed(source, wanted, target):
        (target / "a").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(storage, "download_files", killed)
        node_cache.local_data(place)
    assert not [path for path in (tmp_path / "cache/data").iterdir() if path.is_dir()]
    folder = node_cache.local_data(place)
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert (folder / "a").read_text() == "a"
    times["a"] += 1
    assert node_cache.local_data(place) != folder, "a file was written again"


def test_only_old_drafts_are_what_killed_downloads_left(tmp_path, monkeypatch):
    monkeypatch.setattr(node_cache, "MAX_FOLDERS", 3)
    now = node_cache.time.time()
    ages = {"draft-new": 3600, "draft-old": 7 * 3600, "a": 50, "b": 40, "c": 30, "newest": 90}
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (now - age, now - age))
    (tmp_path / "x.lock").touch()
    node_cache._thin_out(tmp_path, tmp_path / "newest")
    assert {path.name for path in tmp_path.iterdir()} == {"draft-new", "b", "c", "newest", "x.lock"}


def test_eight_copies_are_kept(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
        os.utime(tmp_path / f"{number}", (1000 + number, 1000 + number))
    node_cache._thin_out(tmp_path, tmp_path / "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "3", "4", "5", "6", "7", "8", "9"]


def test_a_local_checkpoint_is_compared_with_its_manifest(tmp_path, remote, monkeypatch):
    folder = checkpoint(tmp_path / "local")
    assert node_cache.checked_checkpoint(str(folder)) == folder
    (folder / "config.json").write_text("[]")
    assert node_cache.checked_checkpoint(str(folder)) == folder, "of the same size: hashes would take minutes"
    (folder / "config.json").write_text("{} ")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        node_cache.checked_checkpoint(str(folder))
    asked = []
    monkeypatch.setattr(node_cache, "local_checkpoint", lambda at, weights: asked.append((at, weights)) or folder)
    assert node_cache.checked_checkpoint(remote, weights=False) == folder and asked == [(remote, False)]


def test_copies_are_known_by_their_manifest_and_kept_beside_one_another(remote, cache, caplog):
    caplog.set_level("INFO")
    light, whole = local_checkpoint(remote, weights=False), local_checkpoint(remote)
    assert light.name == f"{whole.name}-light" and len(whole.name) == 32 and whole.parent == cache
    assert {path.name for path in cache.iterdir()} == {whole.name, light.name, f"{whole.name}.lock"}
    assert caplog.messages[1] == f"fetching {remote} (0.0 MB)"


def test_a_manifest_that_is_damaged_or_lists_too_much_is_told(remote):
    for content in ("[]", '{"files": {"a": {}}}', '{"files": {"a": 3}}', "{}"):
        storage.write_atomically(storage.join(remote, MANIFEST), content.encode())
        with pytest.raises(CheckpointError, match=f"{remote}/manifest.json is damaged: "):
            local_checkpoint(remote)
    content = '{"files": {"gone.json": {"bytes": 1, "sha256": ""}}}'
    storage.write_atomically(storage.join(remote, MANIFEST), content.encode())
    with pytest.raises(CheckpointError, match=f"{remote} lacks a file that its manifest lists: "):
        local_checkpoint(remote)


def test_folders_alone_are_files_without_a_manifest(tmp_path):
    place = f"memory://bucket/{tmp_path.name}/half"
    storage.make_folder(f"{place}/tokenizer")
    storage.write_atomically(f"{place}/tokenizer/a", b"x")
    with pytest.raises(CheckpointError, match="has files but no"):
        local_checkpoint(place)


def test_copies_of_data_are_thinned_out_too(tmp_path, monkeypatch):
    monkeypatch.setattr(node_cache, "MAX_FOLDERS", 2)
    places = [f"memory://bucket/{tmp_path.name}/d{number}" for number in range(3)]
    for place in places:
        storage.write_atomically(f"{place}/a", place.encode())
    first, second, third = (node_cache.local_data(place) for place in places)
    assert first.parent == tmp_path / "cache/data" and (second.is_dir(), third.is_dir()) == (True, True)
    assert not first.exists() and {path.suffix for path in first.parent.iterdir()} == {"", ".lock"}
    assert node_cache._used_at(first) == 0.0
    os.utime(second, (1000, 1000)), os.utime(third, (2000, 2000))
    assert node_cache.local_data(places[1]) == second, "used again"
    assert node_cache.local_data(places[0]) == first
    assert second.is_dir() and not third.exists()
