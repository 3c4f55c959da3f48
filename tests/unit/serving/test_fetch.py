"""Remote images: from allowed, public hosts only, at the address that was checked."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading

import httpx
import pytest

from pipelines.serving import fetch as fetching
from pipelines.serving.fetch import FetchError, fetch, is_public

pytestmark = pytest.mark.security

BODY = b"x" * 5000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append((self.path, self.headers["Host"]))
        if self.path == "/slow":
            self.server.end.wait(60)
        status = {"/redirect": 302, "/missing": 404}.get(self.path, 200)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.location)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        try:
            for _ in range(1000 if self.path == "/endless" else 1):
                self.wfile.write(BODY)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.location = [], "http://169.254.169.254/secrets"
    server.end = threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    resolve_to(monkeypatch, ["127.0.0.1"])
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    yield server
    server.end.set()
    server.shutdown()
    server.server_close()


def resolve_to(monkeypatch, addresses):
    calls = []

    async def getaddrinfo(self, host, port, **_):
        calls.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return calls


def get(url, hosts, max_bytes=10_000, timeout_s=60.0):
    return asyncio.run(fetch(url, allowed_hosts=hosts, max_bytes=max_bytes, timeout_s=timeout_s))


def test_an_allowed_host_is_fetched_under_its_own_name(server):
    host = f"pictures.example:{server.server_port}"
    assert get(f"http://{host}/a%20b.png?x=1&y=%20#top", [host]) == BODY
    assert server.seen == [("/a%20b.png?x=1&y=%20", host)]


@pytest.mark.parametrize(("path", "status"), [("/redirect", 302), ("/missing", 404)])
def test_only_a_plain_success_counts(server, path, status):
    host = f"pictures.example:{server.server_port}"
    with pytest.raises(FetchError, match=f"answered with status {status}"):
        get(f"http://{host}{path}", [host])
    assert [path for path, _ in server.seen] == [path]


def test_the_target_of_a_redirect_is_never_requested(server):
    """The redirect leads to a path that this server would answer: nothing asks for it."""
    host = f"pictures.example:{server.server_port}"
    server.location = f"http://{host}/secrets"
    with pytest.raises(FetchError, match="status 302"):
        get(f"http://{host}/redirect", [host])
    assert [path for path, _ in server.seen] == ["/redirect"]
    assert get(f"http://{host}/secrets", [host]) == BODY, "it would have been answered"


def test_size_is_counted_while_it_comes(server):
    host = f"pictures.example:{server.server_port}"
    with pytest.raises(FetchError, match="larger"):
        get(f"http://{host}/endless", [host])


def test_time_is_bounded(server):
    host = f"pictures.example:{server.server_port}"
    with pytest.raises(FetchError, match=r"within 0\.2 s"):
        get(f"http://{host}/slow", [host], timeout_s=0.2)


def test_a_refused_connection_is_a_sentence(server):
    with pytest.raises(FetchError, match="could not be fetched"):
        get("http://pictures.example:1/x", ["pictures.example:1"])


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example/x.png",
        "http://evilpictures.example/x.png",
        "http://pictures.example./x.png",
        "http://sub.pictures.example/x.png",
        "http://pictures.exampl/x.png",
        "http://pictures.example:81/x.png",
        "http://pictures.example.evil.example/x.png",
        "http://pictures.example@evil.example/x.png",
        "http://pictures.example:80@evil.example/x.png",
        "http://user:secret@pictures.example/x.png",
        "ftp://pictures.example/x.png",
        "file://pictures.example/etc/passwd",
        "gopher://pictures.example/x",
        "http://",
        "http://[::1",
        "http://pictures.example:99999/x",
        "http://ⓔvil.example/",
        "//pictures.example/x.png",
    ],
)
def test_other_addresses_are_never_looked_up(monkeypatch, url):
    calls = resolve_to(monkeypatch, ["93.184.216.34"])
    with pytest.raises(FetchError):
        get(url, ["pictures.example"])
    assert calls == []


@pytest.mark.parametrize(
    ("url", "entry", "refused"),
    [
        ("http://a.example:80/x", "a.example", ""),
        ("https://A.example:443/x", "a.example", ""),
        ("https://a.example/x", "a.example:443", ""),
        ("https://a.example:444/x", "a.example", "a.example:444"),
        ("http://a.example:443/x", "a.example", "a.example:443"),
        ("http://a.example/x", "a.example:443", "a.example"),
    ],
)
def test_a_schemes_own_port_may_be_written_and_another_is_named(monkeypatch, url, entry, refused):
    calls = resolve_to(monkeypatch, ["10.0.0.1"])
    with pytest.raises(FetchError) as caught:
        get(url, [entry])
    told = f"images may not be fetched from {refused}; ask" if refused else "a.example is not on the public internet"
    assert told in str(caught.value) and bool(calls) != bool(refused)


def test_without_a_list_nothing_is_fetched(monkeypatch):
    calls = resolve_to(monkeypatch, ["93.184.216.34"])
    with pytest.raises(FetchError, match="switched off"):
        get("https://pictures.example/x.png", [])
    assert calls == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.0.0.5"],
        ["169.254.169.254"],
        ["93.184.216.34", "192.168.1.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["fe80::1%eth0"],
        [],
    ],
)
def test_a_name_that_leads_inside_is_refused(monkeypatch, addresses):
    resolve_to(monkeypatch, addresses)
    with pytest.raises(FetchError, match="public internet"):
        get("http://pictures.example/x.png", ["pictures.example"])


def test_the_name_is_resolved_once_and_the_address_is_pinned(monkeypatch, server):
    answers = [["127.0.0.1"], ["10.0.0.1"]]  # a name that changes its mind
    calls = []

    async def getaddrinfo(self, host, port, **_):
        calls.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in answers[min(len(calls), 2) - 1]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    host = f"pictures.example:{server.server_port}"
    assert get(f"http://{host}/x", [host]) == BODY
    assert [name for name in calls if name == "pictures.example"] == ["pictures.example"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("fc00::1", False),
        ("fe80::1", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("2002:7f00:1::", False),
        ("2001:0:1::1", False),
        ("2001:20::1", False),  # newer Pythons call some of 2001::/23 global
        ("3fff::1", False),
        ("192.0.0.9", False),
        ("fec0::1", False),
        ("::7f00:1", False),
        ("::93.184.216.34", False),
        ("::ffff:0:127.0.0.1", False),
        ("64:ff9b::5db8:d822", False),
        ("64:ff9b:1::1", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("4000::1", False),
        ("192.0.0.8", False),
        ("192.88.99.1", False),
        ("240.0.0.1", False),
        ("127.1.2.3", False),
        ("fe80::1%eth0", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


# ---------------------------------------------------------------------- the request itself


class Pieces(httpx.AsyncByteStream):
    def __init__(self, *pieces):
        self.pieces = pieces

    async def __aiter__(self):
        for piece in self.pieces:
            yield piece


@pytest.fixture
def client(monkeypatch):
    """What ``fetch`` asks of httpx; answers in three pieces."""
    seen = {}
    build = httpx.AsyncClient

    def answer(request):
        seen["request"] = request
        return httpx.Response(200, stream=Pieces(b"abc", b"def", b"gh"))

    def make(**options):
        seen["options"] = options
        return build(**{**options, "transport": httpx.MockTransport(answer)})

    monkeypatch.setattr(fetching.httpx, "AsyncClient", make)
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    return seen


@pytest.mark.parametrize(
    ("url", "port"),
    [("http://a.example/x", 80), ("https://a.example/x", 443), ("https://a.example:8443/x", 8443)],
)
def test_the_name_is_resolved_with_the_port_and_kept_for_the_certificate(client, monkeypatch, url, port):
    asked = []

    async def getaddrinfo(self, host, port, **options):
        asked.append((host, port, options))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    netloc = url.split("/")[2]
    assert get(f"{url}?q=1#part", [netloc]) == b"abcdefgh", "all pieces"
    assert asked == [("a.example", port, {"type": socket.SOCK_STREAM})]
    request = client["request"]
    assert request.method == "GET" and request.url.host == "93.184.216.34"
    assert (request.url.port or {"http": 80, "https": 443}[request.url.scheme]) == port
    assert request.url.fragment == "" and request.url.raw_path == b"/x?q=1"
    assert request.headers["host"] == netloc and request.extensions["sni_hostname"] == "a.example"
    assert request.headers["accept"] == "image/*" and request.headers["accept-encoding"] == "identity"


def test_no_proxy_no_redirect_and_a_bound_on_connecting(client, monkeypatch):
    resolve_to(monkeypatch, ["93.184.216.34"])
    get("http://a.example/x", ["a.example"])
    options = client["options"]
    assert options["trust_env"] is False and options["follow_redirects"] is False
    assert options["timeout"].connect == fetching.CONNECT_TIMEOUT_S == 5 and options["timeout"].read is None


@pytest.mark.parametrize(("max_bytes", "is_taken"), [(8, True), (7, False)])
def test_the_bound_on_the_body_is_exact(client, monkeypatch, max_bytes, is_taken):
    resolve_to(monkeypatch, ["93.184.216.34"])
    if is_taken:
        assert get("http://a.example/x", ["a.example"], max_bytes=max_bytes) == b"abcdefgh"
        return
    with pytest.raises(FetchError, match=r"^the image at a\.example is larger than 7e-06 MB\.$"):
        get("http://a.example/x", ["a.example"], max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[::1", "the image's URL is not valid."),
        ("http://a.example:99999/x", "the image's URL is not valid."),
        ("ftp://a.example/x", "the image's URL must be http://host/... or https://host/..., without a user name."),
        ("http:///x", "the image's URL must be http://host/... or https://host/..., without a user name."),
        ("http://me@a.example/x", "the image's URL must be http://host/... or https://host/..., without a user name."),
        ("http://b.example/x", "images may not be fetched from b.example; ask this server's operator to allow it."),
    ],
)
def test_a_url_that_is_refused_says_why(client, url, message):
    with pytest.raises(FetchError) as caught:
        get(url, ["a.example"])
    assert str(caught.value) == message and "request" not in client


def test_what_fails_names_the_host(client, monkeypatch):
    async def unknown(self, host, port, **_):
        raise socket.gaierror("no such name")

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.BaseEventLoop, "getaddrinfo", unknown)
        with pytest.raises(FetchError, match=r"^the host a\.example is not known\.$"):
            get("http://a.example/x", ["a.example"])
    resolve_to(monkeypatch, ["93.184.216.34"])

    def broken(*words, **options):
        raise httpx.ReadError("reset by peer at 93.184.216.34")

    monkeypatch.setattr(fetching, "_download", broken)
    with pytest.raises(FetchError, match=r"^the image could not be fetched from a\.example \(ReadError\)\.$"):
        get("http://a.example/x", ["a.example"])
    with pytest.raises(FetchError) as caught:
        get("http://a.example/x", [])
    assert str(caught.value) == (
        "this server takes images as base64 data URLs only; fetching URLs is switched off (allowed_image_hosts)."
    )


def test_the_zone_of_an_address_does_not_matter():
    assert not is_public("fe80::1%eth0") and is_public("2606:4700::1111%eth0")


def test_everything_together_has_the_time_that_is_given(monkeypatch):
    given, timeout = [], asyncio.timeout
    monkeypatch.setattr(fetching.asyncio, "timeout", lambda seconds: given.append(seconds) or timeout(seconds))

    async def resolve(host, port):
        raise TimeoutError

    monkeypatch.setattr(fetching, "_resolve", resolve)
    with pytest.raises(FetchError, match=r"^h\.example did not send the image within 7 s\.$"):
        asyncio.run(fetch("https://h.example/a", allowed_hosts=["h.example"], max_bytes=9, timeout_s=7))
    assert given == [7]
