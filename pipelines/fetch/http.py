"""Requests that are tried again, and answers that are no file: logins, web pages, refusals."""

from __future__ import annotations

import email.utils
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from pipelines.redact import redact

logger = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(30.0, read=60.0)
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_WEB_PAGES = ("text/html", "application/xhtml+xml")
_MOST_REDIRECTS = 5
_ASKED_OTHERWISE = (httpx.codes.METHOD_NOT_ALLOWED, httpx.codes.NOT_IMPLEMENTED)
"""Answers of servers that give files, and say nothing about them (HEAD) beforehand."""

T = TypeVar("T")


class DownloadError(ValueError):
    """A file cannot be had as it should be; the text says why, and what to do."""


class TryAgainError(Exception):
    """The server or the network failed in a way that passes."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: its address.
        num_bytes: what is stated about it; 0 where unknown.
        sha256: in hexadecimal; empty where unknown.
        git_sha1: hash of a small file in a git repository; empty where unknown.
        stated_by: who states these, for messages.
        headers: of the request, e.g. a token of the hub. They are not sent on to other hosts.
    """

    url: str
    num_bytes: int = 0
    sha256: str = ""
    git_sha1: str = ""
    stated_by: str = "its publisher"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The address without passwords."""
        return str(redact(self.url))


@dataclass(frozen=True)
class Stated:
    """Statements of a server about a file: bytes (0: nothing), SHA-256 or git's SHA-1 (empty: nothing)."""

    num_bytes: int = 0
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Retries:
    """When a request is made again.

    Attributes:
        most: failures in a row, without a byte in between, after which it ends.
        first_wait_s: before the second try; doubled each time.
        longest_wait_s: also the longest that a server's ``Retry-After`` is obeyed.
        sleep: waits.
    """

    most: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 300.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, name: str, action: Callable[[], T], position: Callable[[], int] = lambda: 0) -> T:
        """Do something until it works.

        Args:
            name: of the file, for messages.
            action: raises ``TryAgainError`` or one of httpx's errors of a request where it may work later.
            position: bytes that are here; where they grow, failures are counted from the start.

        Raises:
            DownloadError: it failed too often.
        """
        failures, wait_s = 0, self.first_wait_s
        while True:
            before = position()
            try:
                return action()
            except (httpx.RequestError, TryAgainError) as error:
                if position() > before:
                    failures, wait_s = 0, self.first_wait_s
                failures += 1
                reason = str(redact(str(error))) or type(error).__name__
                if failures >= self.most:
                    raise DownloadError(
                        f"{name}: {failures} tries failed in a row, the last one with: {reason}. What was received is "
                        "kept; run the same command to resume."
                    ) from error
                asked = error.wait_s if isinstance(error, TryAgainError) else None
                pause = min(wait_s if asked is None else asked, self.longest_wait_s)
                logger.warning("%s: %s; next try in %.0f s", name, reason, pause)
                self.sleep(pause)
                wait_s = min(2 * wait_s, self.longest_wait_s)


def ask(client: httpx.Client, remote: Remote, name: str, retries: Retries) -> Stated:
    """Size and hash of a file as the server states them, without downloading it.

    The hub states size and hash on its own answer and then redirects to other hosts, which are not asked.

    Raises:
        DownloadError: it refuses, or there is no such file.
    """

    def request() -> Stated:
        url = remote.url
        headers = {"Accept-Encoding": "identity", **remote.headers}
        for _ in range(_MOST_REDIRECTS):
            response = client.head(url, headers=headers, follow_redirects=False)
            target = urljoin(url, response.headers.get("Location", ""))
            if not response.has_redirect_location or "X-Linked-Size" in response.headers:
                break
            if urlsplit(target).netloc != urlsplit(url).netloc:
                headers = {key: value for key, value in headers.items() if key.lower() != "authorization"}
            url = target
        if response.has_redirect_location:  # too many of them: the length is that of the last redirect
            return _stated(response) if "X-Linked-Size" in response.headers else Stated()
        if response.status_code in _ASKED_OTHERWISE:
            return Stated()
        refuse_bad_answer(response, remote, name)
        return Stated() if is_encoded(response, name) else _stated(response)

    return retries.run(f"{name} from {remote.shown}", request)


def _stated(response: httpx.Response) -> Stated:
    size = response.headers.get("X-Linked-Size") or response.headers.get("Content-Length", "")
    tag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag", "")
    digest = tag.removeprefix("W/").strip('"').lower()
    of_hub = "X-Repo-Commit" in response.headers
    return Stated(
        num_bytes=int(size) if size.isdigit() else 0,
        sha256=digest if of_hub and re.fullmatch("[0-9a-f]{64}", digest) else "",
        git_sha1=digest if of_hub and re.fullmatch("[0-9a-f]{40}", digest) else "",
    )


def is_encoded(response: httpx.Response, name: str) -> bool:
    """Whether the body is the file compressed for the way, though that was not asked for.

    Of a file that is gzip itself, servers say the same and mean the file.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    return encoding not in ("", "identity") and not name.lower().endswith((".gz", ".tgz"))


def refuse_bad_answer(response: httpx.Response, remote: Remote, name: str) -> None:
    """Raise where an answer is not the file.

    Raises:
        TryAgainError: it may be later.
        DownloadError: it will not be, and what the user can do.
    """
    status = response.status_code
    if status in _RETRIED:
        raise TryAgainError(f"HTTP {status} {response.reason_phrase}", _retry_after(response))
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise DownloadError(
            f"{remote.shown} refuses access (HTTP {status}): accept its terms in a browser and set HF_TOKEN where it "
            f"is a file of the hub, or get {name} by other means and name its folder with local=."
        )
    if status == httpx.codes.PROXY_AUTHENTICATION_REQUIRED:
        raise DownloadError("the proxy wants a login (HTTP 407): set HTTPS_PROXY=http://user:password@host:port.")
    if not response.is_success:
        raise DownloadError(
            f"{remote.shown} does not give the file (HTTP {status} {response.reason_phrase}): check the address or the "
            f"mirror, or get {name} by other means and name its folder with local=."
        )
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in _WEB_PAGES and not name.lower().endswith((".html", ".htm")):
        host = redact(f"{response.url.scheme}://{response.url.netloc.decode()}")
        raise DownloadError(
            f"{remote.shown} answers with a web page of {host}, not with {name}: a login, a consent or a proxy is in "
            "the way. Open the address in a browser, and name the folder of the downloaded file with local=."
        )


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: a number or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def on_mirror(url: str, base: str) -> str:
    """The same path at another base address; the address itself where there is none."""
    if not base:
        return url
    parts = urlsplit(url)
    return base.rstrip("/") + parts.path + (f"?{parts.query}" if parts.query else "")
