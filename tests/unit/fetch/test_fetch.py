"""Downloads by name: resumed, checked against what is stated, recorded; every refusal is one sentence."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from pipelines.fetch import run as fetching
from pipelines.fetch.addresses import address, published_address
from pipelines.fetch.download import download, part_of
from pipelines.fetch.http import DownloadError, Remote, Retries, on_mirror
from pipelines.fetch.results import LOCK_FILE
from pipelines.fetch.run import fetch, named_files
from pipelines.settings import FetchSettings, SettingsError
from pipelines.storage import DiskFullError
from tests.hub_server import serve_files
from tests.paths import ROOT
from tinygptv.convert.sources import SourceFile, all_parts, find_parts, groups

CONTENT = bytes(range(256)) * 5000
PLAIN = SourceFile(path="eva.pth", name="eva.pth", base="https://files.example/models/")
HUB = SourceFile(
    path="phi-2/model.safetensors", name="model.safetensors", repo="org/phi-2", kind="model", revision="a" * 40
)
SMALL = SourceFile(path="phi-2/config.json", name="config.json", repo="org/phi-2", kind="model", revision="a" * 40)
HUB_PATH = f"/org/phi-2/resolve/{'a' * 40}/model.safetensors"
SMALL_PATH = f"/org/phi-2/resolve/{'a' * 40}/config.json"


def stated(file, content):
    return replace(file, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), stated_by="the test")


@pytest.fixture
def server():
    with serve_files() as files:
        files.files |= {"/models/eva.pth": CONTENT, HUB_PATH: CONTENT[::-1], SMALL_PATH: b'{"a": 1}'}
        yield files


@pytest.fixture
def waits():
    return []


@pytest.fixture
def run(server, tmp_path, monkeypatch, waits):
    """Fetch files from the loopback server into ``tmp_path/weights``."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def call(*files, **settings):
        monkeypatch.setattr(fetching, "named_files", lambda names: list(files))
        values = {"mirror": server.base, "hub": server.base, "output": str(tmp_path / "weights"), "quiet": True}
        return fetch(FetchSettings(**{**values, **settings}), Retries(most=4, sleep=waits.append))

    return call


def received(tmp_path, file):
    return (tmp_path / "weights" / file.path).read_bytes()


# ------------------------------------------------------------------ what is published


def test_groups_name_parts_and_every_address_is_whole():
    assert {p.role for p in find_parts("released")} == {"vision", "qformer", "language", "checkpoint"}
    assert {p.role for p in find_parts("start")} == {"vision", "qformer", "language", "projection"}
    assert set(groups()["stages"]) == {"stage1", "stage2", "stage3", "stage4"}
    paths = [file.path for part in all_parts().values() for file in part.files]
    assert len(paths) == len(set(paths))
    for part in all_parts().values():
        for file in part.files:
            assert bool(file.repo) != bool(file.base)
            assert len(file.revision) == (40 if file.repo else 0)
            assert (len(file.sha256), file.num_bytes > 0) in {(64, True), (0, False)}
            assert published_address(file).startswith("https://") and file.license and file.stated_by
    vision, projection = (find_parts(name)[0].files[0] for name in ("vision", "projection"))
    assert published_address(vision).endswith("/LAVIS/models/BLIP2/eva_vit_g.pth")
    assert "/spaces/Vision-CAIR/minigpt4/resolve/" in published_address(projection)
    assert address(projection, FetchSettings())[0] == published_address(projection)
    assert 8.5e9 < sum(part.num_bytes for part in find_parts("released")) < 8.6e9


def test_the_table_in_the_docs_is_the_data():
    text = (ROOT / "docs/weights.md").read_text()
    for part in all_parts().values():
        for file in part.files:
            if file.sha256:
                line = next(row for row in text.splitlines() if row.startswith(f"| `{file.path}` |"))
                assert f"{file.num_bytes:,}" in line and file.sha256 in line and f"`{part.name}`" in line
        first = part.files[0]
        assert (f"{first.repo}" if first.repo else first.base) in text
        assert not first.revision or first.revision in text


def test_unknown_names_list_the_known_ones():
    with pytest.raises(SettingsError, match=r"'stage9' names no weights; there are: released, start"):
        fetch(FetchSettings(what="stage9", output="/nonexistent"))
    with pytest.raises(SettingsError, match="give what=NAME: released"):
        fetch(FetchSettings())


# ------------------------------------------------------------------ downloads


def test_files_come_whole_and_are_recorded(server, run, tmp_path):
    result = run(stated(PLAIN, CONTENT), HUB, SMALL)
    assert received(tmp_path, PLAIN) == CONTENT and received(tmp_path, HUB) == CONTENT[::-1]
    assert result["bytes_downloaded"] == 2 * len(CONTENT) + 8
    lock = json.loads((tmp_path / "weights" / LOCK_FILE).read_text())["files"]
    assert lock["eva.pth"]["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert lock["phi-2/model.safetensors"]["address"] == published_address(HUB)
    assert lock["phi-2/model.safetensors"]["revision"] == "a" * 40
    assert sorted(p.name for p in (tmp_path / "weights").iterdir() if p.suffix in (".part", ".json")) == [
        "fetch.lock.json",
        "result.json",
    ]


def test_sizes_are_those_of_the_files_that_are_here_or_offered(server, run, tmp_path):
    other = replace(PLAIN, num_bytes=10**10, sha256="0" * 64)
    sizes = [len(CONTENT), len(CONTENT), 8]
    for dry_run in (True, False, True):
        found = run(other, HUB, SMALL, accept_changed=True, dry_run=dry_run)
        assert found["num_bytes"] == sum(sizes)
    del server.files["/models/eva.pth"]
    (tmp_path / "weights/eva.pth").unlink()
    assert run(other, accept_changed=True, dry_run=True)["num_bytes"] == 10**10, "as published"
    assert run(other, dry_run=True)["num_bytes"] == 10**10


def test_a_second_run_asks_for_nothing(server, run):
    run(stated(PLAIN, CONTENT), HUB, SMALL)
    server.requests.clear()
    assert run(stated(PLAIN, CONTENT), HUB, SMALL)["bytes_downloaded"] == 0
    assert not server.requests


def test_a_cut_connection_is_resumed_by_range(server, run, tmp_path, waits):
    server.fail("/models/eva.pth", cut_at=300_000)
    server.fail("/models/eva.pth", cut_at=500_000)
    run(stated(PLAIN, CONTENT))
    assert received(tmp_path, PLAIN) == CONTENT
    starts = [headers.get("Range") for headers in server.asked("/models/eva.pth")]
    assert starts == [None, "bytes=300000-", "bytes=500000-"]
    assert waits == [1.0, 1.0]  # bytes came in between: the waits do not grow


def test_a_killed_run_is_resumed_and_another_version_is_not_joined(server, run, tmp_path):
    for _ in range(4):
        server.fail("/models/eva.pth", cut_at=0)
    server.fail("/models/eva.pth", cut_at=1000)
    with pytest.raises(DownloadError, match=r"4 tries failed in a row.*run the same command to resume"):
        run(PLAIN)
    with pytest.raises(DownloadError):  # one byte range, then nothing more
        [server.fail("/models/eva.pth", cut_at=0) for _ in range(4)]
        run(PLAIN)
    assert part_of(tmp_path / "weights/eva.pth").stat().st_size == 1000
    server.files["/models/eva.pth"] = CONTENT[::-1]  # other content, other ETag: the server ignores the range
    assert run(PLAIN)["bytes_downloaded"] == len(CONTENT)
    assert received(tmp_path, PLAIN) == CONTENT[::-1]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(server, run, tmp_path, waits, form):
    value = "7" if form == "seconds" else formatdate(usegmt=True)
    server.fail("/models/eva.pth", status=429, headers={"Retry-After": value})
    server.fail("/models/eva.pth", status=503)
    run(stated(PLAIN, CONTENT))
    assert received(tmp_path, PLAIN) == CONTENT
    assert waits == ([7.0, 2.0] if form == "seconds" else [0.0, 2.0])


def test_it_ends_after_failures_in_a_row(server, run, waits):
    for _ in range(9):
        server.fail("/models/eva.pth", status=503)
    with pytest.raises(DownloadError, match=r"eva.pth from .*: 4 tries failed .* HTTP 503"):
        run(stated(PLAIN, CONTENT))
    assert waits == [1.0, 2.0, 4.0] and len(server.asked("/models/eva.pth")) == 4


# ------------------------------------------------------------------ answers that are not the file


def test_a_login_page_is_named(server, run, tmp_path):
    page = {"body": b"<html>Sign in</html>", "headers": {"Content-Type": "text/html; charset=utf-8"}}
    server.fail("/models/eva.pth", **page)
    with pytest.raises(DownloadError, match=r"answers with a web page of http://127.*a login, a consent or a proxy"):
        run(stated(PLAIN, CONTENT))
    assert not (tmp_path / "weights/eva.pth").exists() and not part_of(tmp_path / "weights/eva.pth").exists()


def test_a_wrong_size_is_refused_before_it_is_downloaded(server, run, tmp_path):
    with pytest.raises(DownloadError, match=r"offers 1,280,000 bytes, but 1,279,999 are stated by the test: nothing"):
        run(replace(stated(PLAIN, CONTENT), num_bytes=len(CONTENT) - 1))
    assert not part_of(tmp_path / "weights/eva.pth").exists()
    run(replace(stated(PLAIN, CONTENT), num_bytes=1, sha256="0" * 64), accept_changed=True)
    assert received(tmp_path, PLAIN) == CONTENT


@pytest.mark.parametrize("by", ["sha256", "md5", "git"])
def test_a_damaged_file_is_removed_and_named(server, run, tmp_path, by):
    damaged = CONTENT[:-1] + b"x"
    file, path = (stated(PLAIN, CONTENT), "/models/eva.pth") if by == "sha256" else (PLAIN, "/models/eva.pth")
    if by == "git":
        file, path, damaged = SMALL, f"/cdn{SMALL_PATH}", b'{"a": 2}'
    headers = {"x-goog-hash": f"crc32c=AA==,md5={base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}"}
    server.fail(path, body=damaged, headers=headers if by == "md5" else {})
    with pytest.raises(DownloadError, match=r"gave a damaged .*(SHA-256|MD5|git's SHA-1) [0-9a-f]+, but"):
        run(file)
    assert not list((tmp_path / "weights").rglob("*.part"))
    run(file)
    assert received(tmp_path, file) == (b'{"a": 1}' if by == "git" else CONTENT)


def test_a_file_that_changed_since_its_first_download_is_refused(server, run, tmp_path):
    run(PLAIN)
    (tmp_path / "weights/eva.pth").unlink()
    server.files["/models/eva.pth"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match=r"stated by fetch.lock.json \(the first download\)"):
        run(PLAIN)
    run(PLAIN, accept_changed=True)
    assert received(tmp_path, PLAIN) == CONTENT[::-1]


@pytest.mark.parametrize(
    ("status", "text"),
    [(403, "refuses access.*HF_TOKEN.*local="), (404, "HTTP 404.*mirror"), (407, "HTTPS_PROXY")],
)
def test_refusals_say_what_to_do(server, run, status, text):
    server.fail("/models/eva.pth", status=status)
    with pytest.raises(DownloadError, match=text) as error:
        run(stated(PLAIN, CONTENT))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ disk, mirrors, proxies, tokens


def test_too_small_a_disk_is_told_before_anything_is_downloaded(server, run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300 << 20})())
    with pytest.raises(DiskFullError, match=r"0.31 GB free, but 90.00 GB are to be downloaded"):
        run(replace(stated(PLAIN, CONTENT), num_bytes=90 * 10**9))
    assert not server.requests


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_keeps_what_was_received(server, tmp_path, monkeypatch):
    target = tmp_path / "eva.pth"
    part_of(target).symlink_to("/dev/full")
    with httpx.Client() as client, pytest.raises(DiskFullError, match=r"no space left while writing .*is kept"):
        download(client, Remote(f"{server.base}/models/eva.pth"), target)


def test_a_proxy_is_used(server, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.base)
    monkeypatch.setenv("NO_PROXY", "")
    run(stated(PLAIN, CONTENT), mirror="http://unreachable.example/prefix")
    assert [path for _, path, _ in server.requests] == ["/prefix/models/eva.pth"]


@pytest.fixture(autouse=True)
def _proxied_path(server):
    server.files["/prefix/models/eva.pth"] = CONTENT


def test_mirrors_keep_the_path():
    url = "https://storage.example/a/b.pth?x=1"
    assert on_mirror(url, "http://mirror/base/") == "http://mirror/base/a/b.pth?x=1"
    assert on_mirror(url, "") == url


def test_a_token_goes_to_the_hub_and_not_beyond(server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_files() as cdn:
        cdn.files[HUB_PATH] = CONTENT
        server.fail(
            HUB_PATH, status=302, headers={"Location": f"{cdn.base.replace('127.0.0.1', 'localhost')}{HUB_PATH}"}
        )
        cdn.fail(HUB_PATH, body=CONTENT[::-1])
        run(stated(HUB, CONTENT[::-1]))
        assert [headers.get("Authorization") for headers in server.asked(HUB_PATH)] == ["Bearer hf_secret"]
        assert [headers.get("Authorization") for headers in cdn.asked(HUB_PATH)] == [None]


# ------------------------------------------------------------------ files that are here already


def test_files_beside_are_taken_without_a_download(server, run, tmp_path):
    (tmp_path / "usb/phi-2").mkdir(parents=True)
    (tmp_path / "usb/eva.pth").write_bytes(CONTENT)
    (tmp_path / "usb/phi-2/model.safetensors").write_bytes(CONTENT[::-1])
    run(stated(PLAIN, CONTENT), HUB, local=[str(tmp_path / "usb")], offline=True)
    assert not server.requests and received(tmp_path, HUB) == CONTENT[::-1]
    assert (tmp_path / "weights/eva.pth").stat().st_nlink == 2  # a second name, not a second copy


def test_a_wrong_file_beside_is_not_taken(server, run, tmp_path, caplog):
    (tmp_path / "usb").mkdir()
    (tmp_path / "usb/eva.pth").write_bytes(CONTENT[::-1])
    with pytest.raises(DownloadError, match=r"offline=true, but 1 files are missing in .*: eva.pth. Name the folder"):
        run(stated(PLAIN, CONTENT), local=[str(tmp_path / "usb")], offline=True)
    assert "not taken" in caplog.text and not server.requests


def test_a_damaged_file_in_the_folder_is_found(server, run, tmp_path):
    run(stated(PLAIN, CONTENT))
    target = tmp_path / "weights/eva.pth"
    time_ns = target.stat().st_mtime_ns
    target.write_bytes(CONTENT[:-1] + b"x")
    with pytest.raises(DownloadError, match="Remove it to download it again"):
        run(stated(PLAIN, CONTENT))
    os.utime(target, ns=(time_ns, time_ns))  # same size and time: found where hashes are asked for
    run(stated(PLAIN, CONTENT))
    with pytest.raises(DownloadError, match="Remove it"):
        run(stated(PLAIN, CONTENT), verify=True)


def test_a_dry_run_downloads_nothing(server, run, tmp_path, capsys):
    server.files.clear()
    run(stated(PLAIN, CONTENT), SMALL, dry_run=True, quiet=False)
    out = capsys.readouterr().out
    assert "eva.pth: 1.280 MB, http" in out and "phi-2/config.json: unknown size" in out and "0 of 2 files" in out
    assert not server.asked("/models/eva.pth")


def test_two_fetches_do_not_write_into_one_folder(server, run, tmp_path):
    import fcntl

    (tmp_path / "weights").mkdir()
    with (tmp_path / "weights/.fetch").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match="another fetch is writing"):
            run(stated(PLAIN, CONTENT))


# ------------------------------------------------------------------ values


def test_only_what_is_missing_is_counted_and_needs_room(server, run, tmp_path, monkeypatch):
    target = tmp_path / "weights/eva.pth"
    wanted = fetching.Wanted(PLAIN, target, Remote("x", num_bytes=1000), is_here=False)
    assert [wanted.bytes_left, replace(wanted, is_here=True).bytes_left] == [1000, 0]
    target.parent.mkdir()
    part_of(target).write_bytes(CONTENT[:400])
    assert wanted.bytes_left == 600 and replace(wanted, remote=Remote("x", num_bytes=300)).bytes_left == 0
    notes = {"url": f"{server.base}/models/eva.pth", "version": ""}
    target.with_name(".eva.pth.part.json").write_text(json.dumps(notes))
    assert run(stated(PLAIN, CONTENT))["bytes_downloaded"] == len(CONTENT) - 400
    assert server.asked("/models/eva.pth")[0]["Range"] == "bytes=400-"


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_some_room_stays_free(server, run, monkeypatch, spare, fits):
    free = len(CONTENT) + fetching.MARGIN_BYTES + spare
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
    if fits:
        run(stated(PLAIN, CONTENT))
    else:
        with pytest.raises(DiskFullError):
            run(stated(PLAIN, CONTENT))


def test_nothing_is_asked_offline(server, run, tmp_path):
    with pytest.raises(DownloadError, match="offline=true, but 2 files are missing"):
        run(HUB, SMALL, offline=True)
    assert not server.requests


def test_the_lock_file_holds_no_password(server, run, tmp_path, monkeypatch):
    secret = replace(stated(PLAIN, CONTENT), base="https://me:hush@files.example/models/")
    run(secret)
    text = (tmp_path / "weights" / LOCK_FILE).read_text()
    assert "https://***@files.example/models/eva.pth" in text and "hush" not in text


@pytest.mark.parametrize("folder", ["usb", "usb/phi-2"])
def test_a_folder_of_files_may_be_named_itself(server, run, tmp_path, folder):
    (tmp_path / "usb/phi-2").mkdir(parents=True)
    (tmp_path / "usb/phi-2/model.safetensors").write_bytes(CONTENT[::-1])
    (tmp_path / "usb/model.safetensors").write_bytes(b"of another model")
    run(stated(HUB, CONTENT[::-1]), local=[str(tmp_path / folder)], offline=True)
    assert received(tmp_path, HUB) == CONTENT[::-1] and not server.requests
    with pytest.raises(SettingsError, match="local=/nowhere is no folder"):
        run(SMALL, local=["/nowhere"])


def test_a_file_that_a_person_put_there_is_checked_and_recorded(server, run, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/eva.pth").write_bytes(CONTENT)
    result = run(stated(PLAIN, CONTENT))
    assert not server.requests and result["bytes_downloaded"] == 0
    entry = json.loads((tmp_path / "weights" / LOCK_FILE).read_text())["files"]["eva.pth"]
    assert entry == result["files"]["eva.pth"]
    assert (entry["bytes"], entry["sha256"]) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert entry["modified_ns"] == (tmp_path / "weights/eva.pth").stat().st_mtime_ns


def test_files_of_several_names_come_once():
    once = named_files(["released"])
    assert named_files(["released", "vision", "released"]) == once and len(set(once)) == len(once)
    assert {file.path for file in once} == {file.path for part in find_parts("released") for file in part.files}
