"""Requests that are tried again, what a server states about a file, and answers that are none."""

from __future__ import annotations

import httpx
import pytest

from pipelines.fetch import http
from pipelines.fetch.http import (
    DownloadError,
    Remote,
    Retries,
    Stated,
    TryAgainError,
    ask,
    on_mirror,
    refuse_bad_answer,
)

SHA, GIT = "a" * 64, "b" * 40


def failing(*errors):
    """An action that raises these in turn, then returns."""
    left = list(errors)

    def action():
        if left:
            raise left.pop(0)
        return "done"

    return action


@pytest.mark.parametrize(
    ("errors", "waits"),
    [
        ([TryAgainError("x")] * 5, [1, 2, 4, 8, 10]),
        ([TryAgainError("x", 7.0), TryAgainError("x"), TryAgainError("x", 0.0)], [7, 2, 0]),
        ([TryAgainError("x", 9999.0), httpx.ConnectError("x")], [10, 2]),
    ],
)
def test_waits_double_up_to_the_longest_and_a_servers_own_is_obeyed_so_far(errors, waits):
    slept = []
    retries = Retries(most=6, first_wait_s=1, longest_wait_s=10, sleep=slept.append)
    assert retries.run("x", failing(*errors)) == "done" and slept == waits


def test_the_last_failure_in_a_row_is_told_and_bytes_in_between_begin_a_new_row():
    retries = Retries(most=3, sleep=lambda _: None)
    assert retries.run("x", failing(*[TryAgainError("no")] * 2)) == "done"
    with pytest.raises(DownloadError, match=r"^f: 3 tries failed in a row, the last one with: no\."):
        retries.run("f", failing(*[TryAgainError("no")] * 3))
    with pytest.raises(DownloadError, match=r"in a row, the last one with: ReadTimeout\. What was received is kept"):
        retries.run("f", failing(*[httpx.ReadTimeout("")] * 3))
    received = iter(range(100))
    assert retries.run("x", failing(*[TryAgainError("no")] * 9), lambda: next(received)) == "done"


def test_a_byte_begins_a_new_row_of_failures_and_of_waits(caplog):
    received, slept = bytearray(), []
    brings = iter([0, 0, 1, 0, 5, 0, 0, 0])

    def action():
        received.extend(bytes(next(brings)))
        raise TryAgainError("cut by https://me:hush@proxy")

    with pytest.raises(
        DownloadError, match=r"^f: 4 tries failed in a row, the last one with: cut by https://\*\*\*@pr"
    ):
        Retries(most=4, first_wait_s=3, sleep=slept.append).run("f", action, lambda: len(received))
    assert slept == [3, 6, 3, 6, 3, 6, 12] and next(brings, "none left") == "none left"
    assert caplog.messages[-1] == "f: cut by https://***@proxy; next try in 12 s"


def test_waits_double_from_a_second_to_five_minutes():
    slept = []
    assert Retries(most=12, sleep=slept.append).run("x", failing(*[TryAgainError("x")] * 11)) == "done"
    assert slept == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    calls = []
    with pytest.raises(DownloadError, match="6 tries failed"):
        Retries(sleep=calls.append).run("x", failing(*[httpx.ConnectError("x")] * 9))
    assert len(calls) == 5
    with pytest.raises(ZeroDivisionError):
        Retries(sleep=calls.append).run("x", failing(ZeroDivisionError()))
    assert len(calls) == 5, "what is no fault of the network is not tried again"


def client(answers, asked):
    def answer(request):
        assert (request.method, request.headers["Accept-Encoding"]) == ("HEAD", "identity")
        asked.append((str(request.url), request.headers.get("Authorization")))
        status, headers = answers[str(request.url)]
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(b""))

    return httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True)


@pytest.mark.parametrize(
    ("headers", "stated"),
    [
        ({"Content-Length": "5"}, Stated(5)),
        ({"Content-Length": "5", "Content-Encoding": "gzip"}, Stated()),
        (
            {
                "X-Linked-Size": "7",
                "Content-Length": "5",
                "X-Repo-Commit": "c",
                "X-Linked-ETag": f'"{SHA}"',
                "ETag": f'"{GIT}"',
            },
            Stated(7, SHA),
        ),
        ({"Content-Length": "5", "X-Repo-Commit": "c", "ETag": f'W/"{GIT.upper()}"'}, Stated(5, "", GIT)),
        ({"Content-Length": "5", "ETag": f'"{SHA}"'}, Stated(5)),  # a hash of anybody else's choice
        ({"Content-Length": "5", "ETag": f'"{GIT}"'}, Stated(5)),
        ({"X-Repo-Commit": "c", "ETag": '"abc"'}, Stated(0)),
        ({"X-Repo-Commit": "c", "Content-Length": "9", "ETag": f'"{SHA}{SHA}"'}, Stated(9)),
        ({"Content-Length": "five"}, Stated(0)),
        ({}, Stated(0)),
    ],
)
def test_what_a_server_states(headers, stated):
    given = {"https://h/f": (200, headers)}
    with client(given, []) as opened:
        assert ask(opened, Remote("https://h/f"), "f", Retries(most=1)) == stated


@pytest.mark.security
def test_a_token_stays_on_its_host(monkeypatch):
    answers = {
        "https://hub/f": (307, {"Location": "/g"}),
        "https://hub/g": (302, {"Location": "https://cdn/f"}),
        "https://cdn/f": (200, {"Content-Length": "9"}),
    }
    asked = []
    with client(answers, asked) as opened:
        remote = Remote("https://hub/f", headers={"authorization": "Bearer secret"})
        assert ask(opened, remote, "f", Retries(most=1)).num_bytes == 9
    assert asked == [("https://hub/f", "Bearer secret"), ("https://hub/g", "Bearer secret"), ("https://cdn/f", None)]
    asked.clear()
    answers["https://hub/f"] = (302, {"Location": "https://cdn/f", "X-Linked-Size": "3"})
    with client(answers, asked) as opened:
        assert ask(opened, remote, "f", Retries(most=1)).num_bytes == 3 and len(asked) == 1, "the hub has said all"


@pytest.mark.parametrize(("redirects", "stated"), [(4, 9), (5, 0)])
def test_a_redirect_says_nothing_of_the_file(redirects, stated):
    answers = {f"https://h/{n}": (302, {"Location": f"/{n + 1}", "Content-Length": "154"}) for n in range(redirects)}
    answers[f"https://h/{redirects}"] = (200, {"Content-Length": "9"})
    with client(answers, asked := []) as opened:
        assert ask(opened, Remote("https://h/0"), "f", Retries(most=1)) == Stated(stated)
    assert len(asked) == 5


@pytest.mark.parametrize("status", [405, 501])
def test_a_server_that_only_gives_files_states_nothing(status):
    with client({"https://h/f": (status, {"Content-Length": "9"})}, []) as opened:
        assert ask(opened, Remote("https://h/f"), "f", Retries(most=1)) == Stated()


@pytest.mark.parametrize(
    ("status", "headers", "name", "outcome"),
    [
        *((status, {}, "f", "again") for status in (408, 425, 429, 500, 502, 503, 504)),
        (401, {}, "f", "HTTP 401.*HF_TOKEN"),
        (403, {}, "f", "HTTP 403.*HF_TOKEN"),
        (407, {}, "f", r"^the proxy wants a login \(HTTP 407\): set HTTPS_PROXY=http://user:password@host:port\.$"),
        (404, {}, "f", "HTTP 404 Not Found"),
        (304, {}, "f", "HTTP 304 Not Modified"),
        (501, {}, "f", "HTTP 501"),
        (200, {"Content-Type": "text/html; charset=x"}, "f.bin", "answers with a web page of https://h"),
        (200, {"Content-Type": "Application/XHTML+xml"}, "f.bin", "web page"),
        (200, {"Content-Type": "text/html"}, "F.HTML", None),
        (200, {"Content-Type": "text/html"}, "f.Htm", None),
        (200, {}, "f.bin", None),
        (206, {"Content-Type": "application/json"}, "f.json", None),
    ],
)
def test_answers_that_are_no_file(status, headers, name, outcome):
    response = httpx.Response(status, headers=headers, request=httpx.Request("GET", "https://h/f"))
    if outcome is None:
        refuse_bad_answer(response, Remote("https://h/f"), name)
    elif outcome == "again":
        with pytest.raises(TryAgainError):
            refuse_bad_answer(response, Remote("https://h/f"), name)
    else:
        with pytest.raises(DownloadError, match=outcome):
            refuse_bad_answer(response, Remote("https://h/f"), name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        (" 120 ", 120.0),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("", None),
    ],
)
def test_how_long_a_server_asks_to_wait(monkeypatch, text, seconds):
    monkeypatch.setattr(http.time, "time", lambda: 1000.0)
    assert http._retry_after(httpx.Response(503, headers={"Retry-After": text})) == seconds


def test_a_file_is_named_in_what_is_asked_about_it():
    page = {"Content-Type": "text/html", "Content-Length": "3"}
    answers = {"https://h/page": (200, page), "https://me:hush@h/gone": (404, {}), "https://me:hush@h/f": (503, {})}
    with client(answers, []) as opened:
        assert ask(opened, Remote("https://h/page"), "page.html", Retries(most=1)) == Stated(3)
        for url, told in (
            ("https://h/page", r"^https://h/page answers with a web page of https://h, not with a/b.bin: a login"),
            ("https://me:hush@h/gone", r"^https://\*\*\*@h/gone does not give .* or get a/b.bin by other"),
            ("https://me:hush@h/f", r"^a/b.bin from https://\*\*\*@h/f: 1 tries failed .* HTTP 503"),
        ):
            with pytest.raises(DownloadError, match=told):
                ask(opened, Remote(url), "a/b.bin", Retries(most=1))


@pytest.mark.parametrize(
    ("base", "moved"),
    [
        ("", "https://me:hush@storage.example:81/a/b.pth?x=1&y=2"),
        ("http://mirror", "http://mirror/a/b.pth?x=1&y=2"),
        ("http://mirror/base/", "http://mirror/base/a/b.pth?x=1&y=2"),
    ],
)
def test_a_mirror_has_the_same_paths(base, moved):
    assert on_mirror("https://me:hush@storage.example:81/a/b.pth?x=1&y=2", base) == moved
    assert on_mirror("https://h/a", "http://m/") == "http://m/a"
