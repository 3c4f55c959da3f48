"""One file: what a request asks for, what is joined with what, what is checked, what is left."""

from __future__ import annotations

import base64
import gzip
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
        self.answers, self.asked, self.logins = list(answers), [], []

    def __call__(self, request):
        self.asked.append((request.headers.get("Range"), request.headers.get("If-Range")))
        self.logins.append((request.method, str(request.url), request.headers.get("Authorization")))
        assert request.headers["Accept-Encoding"] == "identity", "packed bytes have another size and hash"
        status, headers, body = self.answers.pop(0)
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


def fetch(server, target, remote=Remote(URL), tries=3, report=lambda done, total: None, waits=None):  # noqa: B008 - frozen
    with httpx.Client(transport=httpx.MockTransport(server)) as client:
        retries = Retries(most=tries, sleep=([] if waits is None else waits).append)
        return download(client, remote, target, report, retries)


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
    seen = []
    server = Server(whole(ETag='"v2"'))
    fetch(server, target, Remote(URL, num_bytes=10), report=lambda *now: seen.append(now))
    assert target.read_bytes() == DATA and (seen[0], seen[-1]) == ((0, 10), (10, 10))


@pytest.mark.parametrize(
    "answer",
    [
        rest(5, ETag='"v1"'),
        (206, {"ETag": '"v1"'}, DATA[4:]),
        (206, {"ETag": '"v1"', "Content-Range": "bytes 40-45/46"}, DATA[4:]),
        rest(4, ETag='"v2"'),  # If-Range is not looked at
        rest(4, ETag='"v1"', **{"Content-Encoding": "gzip"}),
    ],
)
def test_another_range_than_the_one_asked_for_is_not_joined(target, answer):
    begin(target)
    server = Server(answer, whole())
    fetch(server, target)
    assert server.asked == [("bytes=4-", '"v1"'), (None, None)] and target.read_bytes() == DATA


PACKED = gzip.compress(DATA)


def packed(body=PACKED, **headers):
    return 200, {"Content-Encoding": "gzip", "Content-Length": str(len(PACKED)), "ETag": '"g"', **headers}, body


def test_a_body_that_is_packed_although_nobody_asked_for_it_is_unpacked(target):
    md5 = base64.b64encode(hashlib.md5(PACKED).digest()).decode()
    of_storage = {"x-goog-stored-content-encoding": "gzip", "x-goog-hash": f"md5={md5}"}
    server = Server(packed(b"junk"), packed(**of_storage))
    fetch(server, target, Remote(URL, num_bytes=10))
    assert target.read_bytes() == DATA
    assert server.asked == [(None, None)] * 2, "its pieces are not those of the file"
    named = target.with_name("f.gz")
    fetch(Server(packed(**{"Content-Encoding": "x-gzip"})), named)
    assert named.read_bytes() == PACKED, "Apache says so of a file that is gzip itself"


@pytest.mark.parametrize("version", ['"v1"', "Sat, 28 Nov 2026 10:00:00 GMT", ""])
def test_a_range_tells_its_version_as_it_did_or_not_at_all(target, version):
    known = Remote(URL, sha256=hashlib.sha256(DATA).hexdigest())
    for headers in ({"ETag": '"v1"', "Last-Modified": "Sat, 28 Nov 2026 10:00:00 GMT"}, {}):
        begin(target, version=version)
        server = Server(rest(4, **headers))
        fetch(server, target, known)
        assert len(server.asked) == 1 and target.read_bytes() == DATA


def test_pieces_that_nobody_asked_for_are_not_joined(target):
    """A server without a version that answers 206 to a request for the whole file: it grew without end."""
    piece = (206, {"Content-Range": "bytes 0-3/10", "Content-Length": "4"}, DATA[:4])
    with pytest.raises(DownloadError, match="the connection ended after 4 of 10 bytes"):
        fetch(Server(*[piece] * 9), target)
    assert part_of(target).read_bytes() == DATA[:4]


@pytest.mark.parametrize("answer", [(204, {}, b""), (200, {"Content-Length": "0"}, b"")])
def test_an_empty_answer_is_no_file(target, answer):
    with pytest.raises(DownloadError, match="3 tries failed in a row, the last one with: the answer is empty"):
        fetch(Server(*[answer] * 3), target)
    assert not target.exists()


def test_a_redirect_without_end_is_told(target):
    with pytest.raises(DownloadError, match="3 tries failed in a row, the last one with: Exceeded maximum allowed red"):
        fetch(Server(*[(302, {"Location": URL}, b"")] * 99), target)


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
        ({"num_bytes": 9}, "", "has 10 bytes, but 9 are stated by the paper"),
        ({"num_bytes": 11}, "", "has 10 bytes, but 11 are stated"),
        (
            {"sha256": "0" * 64},
            "",
            f"has SHA-256 {hashlib.sha256(DATA).hexdigest()}, but {'0' * 64} is stated by the paper",
        ),
        ({"git_sha1": hashlib.sha1(b"blob 10\0" + DATA).hexdigest()}, "", None),
        (
            {"git_sha1": hashlib.sha1(DATA).hexdigest()},
            "",
            f"has git's SHA-1 {hashlib.sha1(b'blob 10' + bytes(1) + DATA).hexdigest()}, but "
            f"{hashlib.sha1(DATA).hexdigest()} is stated by the paper",
        ),
        ({}, hashlib.md5(DATA).hexdigest(), None),
        ({}, "0" * 32, f"has MD5 {hashlib.md5(DATA).hexdigest()}, but {'0' * 32} is stated by its server"),
    ],
)
def test_a_file_is_compared_with_everything_that_is_stated(tmp_path, monkeypatch, changes, md5, what):
    monkeypatch.setattr("pipelines.fetch.download.CHUNK_BYTES", 3)
    (tmp_path / "f").write_bytes(DATA)
    remote = replace(Remote(URL, stated_by="the paper"), **changes)
    if what is None:
        assert check_file(tmp_path / "f", remote, *([md5] if md5 else [])) == hashlib.sha256(DATA).hexdigest()
        return
    with pytest.raises(DownloadError, match=what):
        check_file(tmp_path / "f", remote, md5)


@pytest.mark.parametrize("known", [0, 10])
def test_a_server_need_not_say_how_long_a_file_is(target, known):
    seen = []
    fetch(Server((200, {}, DATA)), target, Remote(URL, num_bytes=known), report=lambda *now: seen.append(now))
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


@pytest.mark.parametrize(
    ("answer", "reason", "wait"),
    [
        ((416, {"Content-Range": "bytes */3"}, b""), "the server has another version than the one begun", 0),
        ((416, {"Content-Length": "0"}, b""), "the server has another version than the one begun", 0),
        (rest(5), "the server sent another range, or version, than the one asked for", 0),
        ((200, {"Content-Length": "10"}, DATA[:9]), "the connection ended after 9 of 10 bytes", 1),
        ((503, {"Retry-After": "7"}, b""), "HTTP 503 Service Unavailable", 7),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_what_is_asked_for_again_at_once_and_what_after_a_wait(target, caplog, answer, reason, wait, begun):
    remote, waits = Remote("https://me:hush@h/f"), []
    if begun:
        begin(target, url="https://***@h/f")
    elif answer[0] == 416:
        with pytest.raises(DownloadError, match=r"does not give the file \(HTTP 416"):  # no range was asked for
            fetch(Server(answer), target, remote)
        return
    fetch(Server(answer, whole()), target, remote, waits=waits)
    assert waits == [wait] and target.read_bytes() == DATA
    assert caplog.messages == [f"f from https://***@h/f: {reason}; next try in {wait} s"]


def test_failures_are_counted_from_the_last_byte_that_came(target):
    def piece(start, stop):
        given = {"Content-Range": f"bytes {start}-9/10", "Content-Length": str(10 - start), "ETag": '"v1"'}
        return 206, given, DATA[start:stop]

    waits, cut = [], (200, {"Content-Length": "10", "ETag": '"v1"'}, DATA[:3])
    server = Server(cut, piece(3, 5), (503, {}, b""), piece(5, 6), piece(6, 10))
    fetch(server, target, tries=3, waits=waits)
    assert [start for start, _ in server.asked] == [None, "bytes=3-", "bytes=5-", "bytes=5-", "bytes=6-"]
    assert waits == [1, 1, 2, 1] and target.read_bytes() == DATA
    target.unlink()
    with pytest.raises(DownloadError, match="f from https://h/f: 2 tries failed in a row, the last one with: HTTP 503"):
        fetch(Server(cut, (503, {}, b"")), target, tries=2)


def test_a_redirect_is_followed_and_the_token_stays_on_its_host(target):
    remote = Remote("https://h/f", headers={"Authorization": "Bearer t"})
    elsewhere = (302, {"Location": "https://cdn/x"}, b"")
    server = Server(elsewhere, (200, {"Content-Length": "10", "ETag": '"v1"'}, DATA[:3]), elsewhere, rest(3))
    fetch(server, target, remote)
    assert server.logins == [("GET", "https://h/f", "Bearer t"), ("GET", "https://cdn/x", None)] * 2
    assert [start for start, _ in server.asked] == [None, None, "bytes=3-", "bytes=3-"] and target.read_bytes() == DATA


def test_a_rest_of_a_file_whose_length_is_not_said(target):
    begin(target)
    seen = []
    fetch(
        Server((206, {"Content-Range": "bytes 4-9/*", "Content-Length": "6"}, DATA[4:])),
        target,
        report=lambda *now: seen.append(now),
    )
    assert seen == [(4, 10), (10, 10)] and target.read_bytes() == DATA


def test_a_refusal_names_the_address_and_the_file(target):
    with pytest.raises(
        DownloadError, match=r"^https://\*\*\*@h/f does not give the file \(HTTP 404.* or get f by other"
    ):
        fetch(Server((404, {}, b"")), target, Remote("https://me:hush@h/f"))
    page = (200, {"Content-Type": "text/html", "Content-Length": "1"}, b"x")
    fetch(Server(page), target.with_name("f.html"), Remote(URL, num_bytes=1))
    assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("f.html", b"x")]


def test_another_size_than_the_stated_one_is_told_before_a_byte_is_taken(target):
    begin(target)
    with pytest.raises(DownloadError) as caught:
        fetch(Server(rest(4)), target, Remote(URL, num_bytes=1234567, stated_by="the paper"))
    assert str(caught.value) == (
        "https://h/f offers 10 bytes, but 1,234,567 are stated by the paper: nothing was downloaded. Check the mirror; "
        "accept_changed=true takes the file as it is."
    )
    assert part_of(target).read_bytes() == DATA[:4]


@pytest.mark.parametrize("text", ["md5=????AAAA", "crc32c=AAAA", "md5=", ""])
def test_a_statement_that_is_no_md5_is_passed_over(target, text):
    fetch(Server(whole(**{"x-goog-hash": text})), target)
    assert target.read_bytes() == DATA


def test_an_md5_is_found_among_other_statements(target):
    with pytest.raises(
        DownloadError, match=r"f\.part has MD5 [0-9a-f]{32}, but 000000000000000000000000000000ff is stat"
    ):
        fetch(Server(whole(**{"x-goog-hash": "crc32c=AA==, md5=AAAAAAAAAAAAAAAAAAAA/w=="})), target)
