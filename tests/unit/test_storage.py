"""Locations, patterns, compressed files, and files that are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import pickle
from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem

from pipelines import storage
from pipelines.settings import SettingsError
from pipelines.storage import Location
from pipelines.storage import files as files_module
from pipelines.storage import location as location_module


@pytest.mark.parametrize(
    ("pattern", "places"),
    [
        ("a/b.tar", ["a/b.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("x/{train,val}.json", ["x/train.json", "x/val.json"]),
        ("{a,b}{0..1}", ["a0", "a1", "b0", "b1"]),
        ("{single}", ["{single}"]),
    ],
)
def test_braces(pattern, places):
    assert storage.expand_braces(pattern) == places


@pytest.mark.parametrize("root", ["local", "memory"])
def test_patterns_find_files_in_order(tmp_path, root):
    place = str(tmp_path) if root == "local" else "memory://patterns"
    for name in ("b/2.tar", "b/1.tar", "a/1.tar", "a/1.txt", "a/deep/3.tar"):
        storage.make_folder(storage.parent(storage.join(place, name)))
        storage.write_atomically(storage.join(place, name), b"x" * 3)
    found = storage.find_files(storage.join(place, "*", "?.tar"))
    assert [file.name for file in found] == ["a/1.tar", "b/1.tar", "b/2.tar"]
    assert [storage.read_bytes(file.location) for file in found] == [b"xxx"] * 3
    assert [file.name for file in storage.find_files(storage.join(place, "b/1.tar"))] == ["1.tar"]
    assert storage.find_files(storage.join(place, "c*", "1.tar")) == []
    assert storage.list_names(storage.join(place, "a")) == {"1.tar": 3, "1.txt": 3}


@pytest.mark.parametrize("root", ["local", "memory"])
@pytest.mark.parametrize("folder", ["b[v1]", "c{a,b}", "d*", "e?", "f{0..2}"])
def test_what_exists_is_taken_as_it_is_named(tmp_path, root, folder):
    place = str(tmp_path) if root == "local" else f"memory://brackets-{folder[0]}"
    alike = ("ca/own.jsonl", "dd/own.jsonl", "f1/own.jsonl", "bv", "cb", "dfile", "ex", "f0")
    for name in (f"{folder}/own.jsonl", f"{folder}/x[1].jsonl", *alike):
        storage.make_folder(storage.parent(storage.join(place, name)))
        storage.write_atomically(storage.join(place, name), name.encode())

    def found(pattern):
        return [storage.read_bytes(file.location).decode() for file in storage.find_files(f"{place}/{pattern}")]

    assert found(f"{folder}/own.jsonl") == [f"{folder}/own.jsonl"]
    assert found(f"{folder}/x[1].jsonl") == [f"{folder}/x[1].jsonl"]
    if folder[1] in "[{":
        assert found(f"{folder}/*.jsonl") == [f"{folder}/own.jsonl", f"{folder}/x[1].jsonl"]
    assert found(folder) == []


def test_hidden_files_match_only_a_pattern_of_their_own(tmp_path):
    for name in ("a.tar", "._a.tar", ".hidden/b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in storage.find_files(str(tmp_path / "*.tar"))] == ["a.tar"]
    assert [file.name for file in storage.find_files(str(tmp_path / "*" / "*.tar"))] == []
    assert [file.name for file in storage.find_files(str(tmp_path / ".*.tar"))] == ["._a.tar"]
    assert [file.name for file in storage.find_files(str(tmp_path / "._a.tar"))] == ["._a.tar"]


def test_files_that_are_named_and_missing_are_told(tmp_path, caplog):
    for number in (0, 2):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"x")
    found = storage.find_files(str(tmp_path / "{00000..00003}.tar"))
    assert [file.name for file in found] == ["00000.tar", "00002.tar"]
    assert "2 of 4 are missing" in caplog.text
    assert "00001.tar" in caplog.text


def test_one_connection_serves_a_remote_folder(monkeypatch):
    import fsspec

    opened = []
    connect = fsspec.core.url_to_fs
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda place: (opened.append(place), connect(place))[1])
    for number in range(5):
        storage.write_atomically(f"memory://connected/folder/{number}", b"x")
        assert storage.read_bytes(f"memory://connected/folder/{number}") == b"x"
    assert opened == ["memory://connected"]


@pytest.mark.security
@pytest.mark.parametrize("folder", ["/data", "s3://bucket/data?region=x"])
@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "..", "", ".", "a\0b"])
def test_names_that_lead_out_of_a_folder(folder, name):
    with pytest.raises(ValueError, match="no path below a folder") as error:
        Location.parse(folder) / name
    assert repr(name[:200]) in str(error.value)


@pytest.mark.parametrize(
    ("name", "path"), [("a.jpg", "/data/a.jpg"), ("./a/b c.jpg", "/data/a/b c.jpg"), ("a..b", "/data/a..b")]
)
def test_names_that_stay(name, path):
    assert (Location.parse("/data") / name).path == path


ODD_NAMES = [
    "a.jpg?endpoint_override=evil:9000&scheme=http",
    "a#b",
    "a%2e%2e%2fb",
    "a:b@c",
    "a b",
    "x=1&y=2",
    "caf\u00e9",
]


@pytest.mark.security
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_never_becomes_part_of_the_address(name, monkeypatch):
    """A file system that is asked for something else than its root would contact whom the name says."""
    asked = []
    monkeypatch.setattr(
        location_module, "_connect", lambda root: (asked.append(root), (LocalFileSystem(), "bucket"))[1]
    )
    folder = Location.parse("s3://bucket/images?region=x")
    _, path = storage.resolve(folder / name)
    assert asked == ["s3://bucket?region=x"]
    assert path == f"bucket/images/{name}"
    assert pickle.loads(pickle.dumps(folder / name)) == folder / name


def test_text_joins_only_names_of_ours():
    with pytest.raises(ValueError, match="would be read as options"):
        storage.join("s3://bucket/images", "a.jpg?endpoint_override=evil:9000")
    with pytest.raises(ValueError, match="no path below a folder"):
        storage.join("s3://bucket/images", "../a.jpg")
    assert storage.join("/data", "a?b=c") == "/data/a?b=c" == storage.join("/data/", "a?b=c")
    assert storage.join("relative/", "a", "b") == "relative/a/b", "as it was written"
    odd = storage.join(Location.parse("s3://bucket/images"), "a?b=c", "d")
    assert odd == Location("s3://bucket", "images/a?b=c/d"), "names from data belong into a Location"
    assert Location("", "/") / "a" == Location("", "/a")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_found_and_read_in_a_bucket(name):
    import fsspec

    fsspec.filesystem("memory").pipe(f"/odd/data/{name}", name.encode())
    (found,) = storage.find_files("memory://odd/data/*")
    assert storage.read_bytes(found.location) == name.encode()
    assert found.location == Location("memory://odd", f"data/{name}")
    storage.remove_file(found.location)
    assert not storage.exists(found.location)


@pytest.mark.parametrize(
    ("text", "root", "path", "uri"),
    [
        ("/a/b/", "", "/a/b", "/a/b"),
        ("file:///a/b", "", "/a/b", "/a/b"),
        ("file://localhost/a", "", "/a", "/a"),
        ("s3://bucket", "s3://bucket", "", "s3://bucket"),
        ("s3://bucket/a/b/?region=x", "s3://bucket?region=x", "a/b", "s3://bucket/a/b?region=x"),
        ("s3://bucket//a", "s3://bucket", "a", "s3://bucket/a"),
        ("s3://bucket?region=x", "s3://bucket?region=x", "", "s3://bucket?region=x"),
        ("s3://bucket/?.tar", "s3://bucket", "?.tar", "s3://bucket/?.tar"),
        ("gs://bucket/a#b", "gs://bucket", "a#b", "gs://bucket/a#b"),
        ("abfs://c@account.dfs.core.windows.net/a", "abfs://c@account.dfs.core.windows.net", "a", None),
        ("zip://a.csv::s3://bucket/x.zip", "zip://a.csv::s3://bucket/x.zip", "", None),
    ],
)
def test_text_is_parsed_once_and_written_back(text, root, path, uri):
    location = Location.parse(text)
    assert location == Location(root, path)
    assert location.uri == (uri or text)
    assert Location.parse(location) is location


def test_relative_paths_become_absolute_because_workers_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location.parse("a/b").path == f"{tmp_path}/a/b"
    monkeypatch.setenv("HOME", "/home/me")
    assert Location.parse("~/a") == Location("", "/home/me/a")
    assert Location.parse("/a").parent.parent == Location("", "/")
    assert Location.parse("s3://bucket/a").parent == Location("s3://bucket", "")
    assert Location.parse("s3://bucket/x/y/a.b").name == "a.b"
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert Location.parse("link/a").path == f"{tmp_path}/link/a", "other nodes may link elsewhere"


def test_local_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/b") == storage.absolute(f"file://{tmp_path}/a/b") == f"{tmp_path}/a/b"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"


def test_passwords_are_not_shown():
    shown = str(Location.parse("s3://key:secret@bucket/a?secret_key=hush&region=x"))
    assert "secret@" not in shown and "hush" not in shown
    assert "region=x" in shown


def test_query_of_a_uri_stays_at_its_end():
    place = "s3://bucket/set?endpoint_override=localhost:9000"
    assert storage.join(place, "a", "b.arrow") == "s3://bucket/set/a/b.arrow?endpoint_override=localhost:9000"
    assert storage.parent("s3://bucket/set/a?region=x") == "s3://bucket/set?region=x"
    assert storage.file_name("s3://bucket/set/a?region=x") == "a"
    assert storage.join("a?b", "*.tar") == "a?b/*.tar"


@pytest.mark.parametrize(
    ("root", "account", "asked"),
    [
        ("az://box", "me", "abfss://box@me.dfs.core.windows.net"),
        ("abfs://box?enable_tls=false", "me", "abfss://box@me.dfs.core.windows.net?enable_tls=false"),
        ("abfs://box@you.dfs.core.windows.net", "me", "abfs://box@you.dfs.core.windows.net"),
        ("hdfs://host:9000", "", "hdfs://host:9000/"),
        ("hdfs://host?user=x", "", "hdfs://host?user=x"),
        ("s3://bucket?region=x", "me", "s3://bucket?region=x"),
        ("az://box", "", "az://box"),
        ("s3://key:secret@bucket", "me", "s3://key:secret@bucket"),
    ],
)
def test_the_address_that_is_opened(monkeypatch, root, account, asked):
    class Opened(Exception):
        pass

    def from_uri(address):
        raise Opened(address)

    monkeypatch.setenv(location_module.AZURE_ACCOUNT, account)
    monkeypatch.setattr(location_module.pafs, "FileSystem", SimpleNamespace(from_uri=from_uri))
    with pytest.raises(Opened) as opened:
        location_module._connect.__wrapped__(root)
    assert str(opened.value) == asked


def test_a_container_without_its_account_is_told(monkeypatch):
    monkeypatch.delenv(location_module.AZURE_ACCOUNT, raising=False)
    with pytest.raises(SettingsError, match=r"cannot open az://box: the storage account is not known; set AZURE_STOR"):
        storage.resolve("az://box/a")


def test_what_pyarrow_cannot_open_is_opened_by_fsspec(monkeypatch):
    import fsspec

    def unknown(address):
        raise ValueError("unrecognized")

    opened, memory = [], fsspec.filesystem("memory")
    monkeypatch.setattr(location_module.pafs, "FileSystem", SimpleNamespace(from_uri=unknown))
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda root: opened.append(root) or (memory, "base"))
    for root in ("abfs://box@you.dfs.core.windows.net", "other://x?a=b"):
        system, base = location_module._connect.__wrapped__(root)
        assert (system.type_name, base) == ("py::fsspec+memory", "base")
    assert opened == ["abfs://box@you.dfs.core.windows.net", "other://x?a=b"]


@pytest.mark.parametrize(
    ("base", "path", "found"),
    [
        ("", "a/b", "a/b"),
        ("bucket", "a/b", "bucket/a/b"),
        ("/", "a/b", "/a/b"),
        ("/base/", "a", "/base/a"),
        ("bucket", "", "bucket"),
        ("/", "", "/"),
    ],
)
def test_the_path_in_a_file_system_begins_at_the_address(monkeypatch, base, path, found):
    system = LocalFileSystem()
    monkeypatch.setattr(location_module, "_connect", lambda root: (system, base))
    assert storage.resolve(Location("x://y", path)) == (system, found)


def test_a_storage_that_cannot_be_opened_is_the_users_mistake(monkeypatch):
    def refuse(address):
        raise OSError("no such region")

    monkeypatch.setattr(location_module.pafs, "FileSystem", SimpleNamespace(from_uri=refuse))
    with pytest.raises(SettingsError) as caught:
        location_module._connect.__wrapped__("s3://key:secret@bucket")
    assert str(caught.value) == (
        "cannot open s3://***@bucket: no such region; check the name, the region and the credentials."
    )


def test_unknown_protocol_is_the_users_mistake():
    with pytest.raises(SettingsError, match="cannot open"):
        storage.resolve("nonsense://a/b")


def test_full_disk_becomes_one_sentence_and_other_errors_pass():
    with pytest.raises(storage.DiskFullError, match="no space left while writing x"), storage.disk_full_as_error("x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(PermissionError), storage.disk_full_as_error("x"):
        raise PermissionError


@pytest.mark.parametrize("size", [10, 100_000])
def test_device_that_is_really_full(tmp_path, monkeypatch, size):
    full = tmp_path / "draft"
    monkeypatch.setattr(files_module, "draft_of", lambda target: full)
    (tmp_path / "a").write_bytes(b"before")
    for write in (
        lambda: storage.write_atomically(str(tmp_path / "a"), b"x" * size),
        lambda: storage.write_lines(str(tmp_path / "a"), [{"x": "y" * size}]),
    ):
        full.symlink_to("/dev/full")
        with pytest.raises(storage.DiskFullError, match="run the same command again"):
            write()
    assert (tmp_path / "a").read_bytes() == b"before", "an earlier file stays as it was"


@pytest.mark.parametrize("error", [RuntimeError, ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("root", ["local", "memory"])
def test_a_write_that_fails_leaves_nothing(tmp_path, root, error):
    """Closing a stream of an object storage would publish what was written so far."""
    folder = str(tmp_path) if root == "local" else f"memory://failing/{tmp_path.name}"
    storage.make_folder(folder)

    def lines():
        yield {"a": 1}
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        storage.write_lines(storage.join(folder, "lines.jsonl"), lines())
    assert storage.list_names(folder) == {}
    assert storage.write_lines(storage.join(folder, "lines.jsonl"), [{"a": 1}, {"b": 2}]) == 2
    assert list(storage.list_names(folder)) == ["lines.jsonl"]


def test_json_lines_are_lines_for_every_reader(tmp_path):
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\nb", "caf\u00e9", "\ud800"]
    path = str(tmp_path / "lines.jsonl")
    storage.write_lines(path, [{"text": text} for text in texts])
    lines = storage.read_bytes(path).decode().splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path):
    names = {storage.draft_of(tmp_path / "a") for _ in range(20)}
    assert len(names) == 20
    for name in names:
        name.write_bytes(b"unfinished")
    storage.write_atomically(str(tmp_path / "a"), b"x")
    storage.remove_drafts(str(tmp_path))
    assert storage.list_names(str(tmp_path)) == {"a": 1}


def test_second_name_costs_no_copy(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    storage.link_or_copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino


@pytest.mark.parametrize(
    ("text", "protocol", "is_object_store", "shows_partial_files"),
    [
        ("/a", "", False, False),
        *((f"{name}://b/a", name, True, False) for name in ("s3", "gs", "gcs", "az", "abfs", "abfss")),
        *((f"{name}://b/a", name, False, True) for name in ("hdfs", "viewfs", "webhdfs", "sftp", "ssh", "smb", "ftp")),
        ("memory://b/a", "memory", False, False),
    ],
)
def test_kinds_of_storages(text, protocol, is_object_store, shows_partial_files):
    found = Location.parse(text)
    kinds = (found.protocol, found.is_object_store, found.shows_partial_files)
    assert kinds == (protocol, is_object_store, shows_partial_files)
    assert found.is_local is storage.is_local(text) is (not protocol)


def test_every_compression_is_known_by_its_first_bytes(tmp_path):
    heads = {"gzip": b"\x1f\x8b", "bz2": b"BZh9", "zstd": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18"}
    for kind, head in {**heads, "xz": b"\xfd7zXZ\x00", "": b"\x1f\x8c"}.items():
        (tmp_path / "f").write_bytes(head + b"rest")
        assert storage.compression_of(str(tmp_path / "f")) == kind
