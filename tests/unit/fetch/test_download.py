"""One file: what a request asks for, what is joined with what, what is checked, what is left."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace

import httpx
import pytest

from pipelines.fetch.download import _notes, check_file, download, part_of
from pipelines.fetch.http import DownloadError, Remote, Retries

DATA = b"0123456789"
URL = "https://h/f"


class Server:
    """Answers in turn, or by ``answer``; notes the requests."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, request):
        self.asked.append((request.headers.get("Range"), request.headers.get("If-Range")))
        assert request.headers["Accept-Encoding"] == "identity", "packed bytes have another size and hash"
        status, headers, body = self.answers.pop(0)
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


def fetch(server, target, remote=Remote(URL), tries=3, report=lambda done, total: None):  # noqa: B008 - frozen
    with httpx.Client(transport=httpx.MockTransport(server)) as client:
        return download(client, remote, target, report, Retries(most=tries, sleep=lambda _: None))


def whole(**headers):
    return 200, {"Content-Length": "10", "ETag": '"v1"', **headers}, DATA


def rest(start, **headers):
    return 206, {"Content-Range": f"bytes {start}-9/10", "Content-Length": str(10 - start), **headers}, DATA[start:]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "f"


def begin(target, data=DATA[:4], url=URL, version='"v1"'):
    """What an interrupted run left."""
    part_of(target).write_bytes(data)
    _notes(target).write_text(json.dumps({"url": url, "version": version}))


def test_a_whole_file_comes_in_one_request_and_leaves_no_notes(target):
    seen = []
    assert fetch(Server(whole()), target, report=lambda *now: seen.append(now)) == hashlib.sha256(DATA).hexdigest()
    assert [path.name for path in target.parent.iterdir()] == ["f"] and target.read_bytes() == DATA
    assert seen[0] == (0, 10) and seen[-1] == (10, 10)


def test_the_rest_of_the_same_version_is_asked_for(target):
    begin(target)
    server, seen = Server(rest(4)), []
    fetch(server, target, report=lambda *now: seen.append(now))
    assert server.asked == [("bytes=4-", '"v1"')] and target.read_bytes() == DATA and seen[0] == (4, 10)
    assert [path.name for path in target.parent.iterdir()] == ["f"]


@pytest.mark.parametrize("left", [{"url": "https://h/other"}, {"version": ""}])
def test_bytes_of_another_address_or_of_no_known_version_are_not_joined(target, left):
    begin(target, b"xxxx", **left)
    server = Server(whole())
    fetch(server, target)
    assert server.asked == [(None, None)] and target.read_bytes() == DATA
    begin(target, b"0123", version="")
    known = Remote(URL, sha256=hashlib.sha256(DATA).hexdigest())
    server = Server(rest(4))
    fetch(server, target, known)
    assert server.asked == [("bytes=4-", None)], "its hash tells whether they belong together"
    begin(target)
    server = Server(rest(4))
    fetch(server, target, known)
    assert server.asked == [("bytes=4-", '"v1"')], "the server tells it sooner"


def test_a_server_that_sends_all_again_begins_the_file_again(target):
    begin(target, b"xxxx")
    fetch(Server(whole(ETag='"v2"')), target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize("answer", [rest(5, ETag='"v1"'), (206, {"ETag": '"v1"'}, DATA[4:])])
def test_another_range_than_the_one_asked_for_is_not_joined(target, answer):
    begin(target)
    server = Server(answer, whole())
    fetch(server, target)
    assert server.asked == [("bytes=4-", '"v1"'), (None, None)] and target.read_bytes() == DATA


def test_a_part_that_is_all_there_is_taken_and_a_longer_one_is_not(target):
    begin(target, DATA)
    fetch(Server((416, {"Content-Range": "bytes */10"}, b"")), target)
    assert target.read_bytes() == DATA
    begin(target, DATA + b"xx")
    server = Server((416, {"Content-Range": "bytes */10"}, b""), whole())
    fetch(server, target)
    assert server.asked[1] == (None, None) and target.read_bytes() == DATA
    begin(target, DATA + b"xx")
    fetch(Server((416, {"Content-Range": "bytes */10"}, b""), whole()), target, Remote(URL, num_bytes=10))
    assert target.read_bytes() == DATA
    begin(target, DATA)
    fetch(Server(), target, Remote(URL, num_bytes=10))
    assert target.read_bytes() == DATA, "nothing is asked for"


def test_a_connection_that_ends_one_byte_early_is_resumed(target):
    server = Server((200, {"Content-Length": "10", "ETag": '"v1"'}, DATA[:9]), rest(9))
    fetch(server, target)
    assert server.asked == [(None, None), ("bytes=9-", '"v1"')] and target.read_bytes() == DATA


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({"ETag": '"v1"', "Last-Modified": "then"}, '"v1"'),
        ({"ETag": 'W/"v1"', "Last-Modified": "then"}, "then"),
        ({"ETag": 'W/"v1"'}, ""),
    ],
)
def test_only_a_strong_tag_or_a_time_is_a_version(target, headers, version):
    given = {"Content-Length": "10", **headers}
    with pytest.raises(DownloadError):
        fetch(Server((200, given, DATA[:3])), target, tries=1)
    assert json.loads(_notes(target).read_text()) == {"url": URL, "version": version}
    assert part_of(target).read_bytes() == DATA[:3]


@pytest.mark.parametrize(
    ("changes", "md5", "what"),
    [
        ({"num_bytes": 10, "sha256": hashlib.sha256(DATA).hexdigest()}, "", None),
        ({"num_bytes": 9}, "", "has 10 bytes, but 9 are stated"),
        ({"num_bytes": 11}, "", "has 10 bytes, but 11 are stated"),
        (
            {"sha256": "0" * 64},
            "",
            f"has SHA-256 {hashlib.sha256(DATA).hexdigest()}, but {'0' * 64} is stated by its publisher",
        ),
        ({"git_sha1": hashlib.sha1(b"blob 10\0" + DATA).hexdigest()}, "", None),
        ({"git_sha1": hashlib.sha1(DATA).hexdigest()}, "", "git's SHA-1"),
        ({}, hashlib.md5(DATA).hexdigest(), None),
        ({}, "0" * 32, f"has MD5 {hashlib.md5(DATA).hexdigest()}, but {'0' * 32} is stated by its server"),
    ],
)
def test_a_file_is_compared_with_everything_that_is_stated(tmp_path, monkeypatch, changes, md5, what):
    monkeypatch.setattr("pipelines.fetch.download.CHUNK_BYTES", 3)
    (tmp_path / "f").write_bytes(DATA)
    remote = replace(Remote(URL), **changes)
    if what is None:
        assert check_file(tmp_path / "f", remote, md5) == hashlib.sha256(DATA).hexdigest()
        return
    with pytest.raises(DownloadError, match=what):
        check_file(tmp_path / "f", remote, md5)


def test_a_server_need_not_say_how_long_a_file_is(target):
    seen = []
    fetch(Server((200, {}, DATA)), target, report=lambda *now: seen.append(now))
    assert target.read_bytes() == DATA and seen == [(0, 0), (10, 0)]


def stated_md5(data):
    return {"x-goog-hash": f"crc32c=AA==,md5={base64.b64encode(hashlib.md5(data).digest()).decode()}"}


def test_what_a_server_states_of_a_whole_part_is_compared(target):
    for data, fits in ((DATA, True), (b"other", False)):
        begin(target, DATA)
        server = Server((416, {"Content-Range": "bytes */10", **stated_md5(data)}, b""))
        if fits:
            fetch(server, target)
            target.unlink()
        else:
            with pytest.raises(DownloadError, match="MD5"):
                fetch(server, target)
    assert list(target.parent.iterdir()) == []


def test_a_wrong_file_leaves_nothing_to_be_resumed(target):
    with pytest.raises(DownloadError, match="gave a damaged or another file, which was removed"):
        fetch(Server(whole(**stated_md5(b"other"))), target)
    assert list(target.parent.iterdir()) == []
    fetch(Server(whole(**stated_md5(DATA))), target)
    assert target.read_bytes() == DATA
