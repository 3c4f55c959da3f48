"""One file over HTTP: resumed where it was cut, checked against the size and hash that are stated about it.

The bytes go to ``.NAME.part`` beside the target. ``.NAME.part.json`` says which version of the file they belong to, so
that a later run asks for the rest of the same version (``Range`` with ``If-Range``) and never joins two versions.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from pathlib import Path

import httpx

from pipelines import storage
from pipelines.fetch.http import DownloadError, Remote, Retries, TryAgainError, is_encoded, refuse_bad_answer
from pipelines.json_files import read_json_object, write_json

CHUNK_BYTES = 1 << 20


def part_of(target: Path) -> Path:
    """Where the bytes of an unfinished download are kept."""
    return target.with_name(f".{target.name}.part")


def download(
    client: httpx.Client,
    remote: Remote,
    target: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    retries: Retries | None = None,
) -> str:
    """Download a file; what an earlier run has received of the same version is not asked for again.

    Args:
        client: with its timeouts and proxies.
        remote: the file.
        target: where it appears when it is complete and checked. Its folder exists.
        report: called with bytes received and bytes in all (0: unknown).
        retries: when it is tried again.

    Returns:
        Its SHA-256.

    Raises:
        DownloadError: the server refuses, or serves something else than the file; or it failed too often.
        DiskFullError: there is no room; what was received is kept.
    """
    with storage.disk_full_as_error(target):
        md5 = (retries or Retries()).run(
            f"{target.name} from {remote.shown}",
            lambda: _receive(client, remote, target, report),
            lambda: size_of(part_of(target)),
        )
    return _publish(remote, target, md5)


def check_file(path: Path, remote: Remote, md5: str = "") -> str:
    """Compare a complete file with what is stated about it; returns its SHA-256.

    Raises:
        DownloadError: size or hash differ.
    """
    size = size_of(path)
    if remote.num_bytes and size != remote.num_bytes:
        raise DownloadError(f"{path} has {size:,} bytes, but {remote.num_bytes:,} are stated by {remote.stated_by}.")
    sha256, md5_digest = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    git_sha1 = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            for digest, value in ((sha256, True), (md5_digest, md5), (git_sha1, remote.git_sha1)):
                if value:
                    digest.update(chunk)
    for name, digest, value, stated_by in (
        ("SHA-256", sha256, remote.sha256, remote.stated_by),
        ("git's SHA-1", git_sha1, remote.git_sha1, remote.stated_by),
        ("MD5", md5_digest, md5, "its server"),
    ):
        if value and digest.hexdigest() != value:
            raise DownloadError(f"{path} has {name} {digest.hexdigest()}, but {value} is stated by {stated_by}.")
    return sha256.hexdigest()


def _publish(remote: Remote, target: Path, md5: str) -> str:
    """Check what was received and give it its name; a wrong file is removed, so that the next run begins again."""
    part = part_of(target)
    try:
        sha256 = check_file(part, remote, md5)
    except DownloadError as error:
        part.unlink()
        _notes(target).unlink(missing_ok=True)
        raise DownloadError(f"{remote.shown} gave a damaged or another file, which was removed: {error}") from error
    part.replace(target)
    _notes(target).unlink(missing_ok=True)
    return sha256


def _receive(client: httpx.Client, remote: Remote, target: Path, report: Callable[[int, int], None]) -> str:
    """One request; returns the MD5 that the server states, or an empty text."""
    part = part_of(target)
    start, headers = _resume_headers(remote, target)
    if start and start == remote.num_bytes:
        return ""
    with client.stream("GET", remote.url, headers=headers, follow_redirects=True) as response:
        if start and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if _total(response, start) == start:
                return _stated_md5(response)
            part.unlink()
            raise TryAgainError("the server has another version than the one begun", 0.0)
        refuse_bad_answer(response, remote, target.name)
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        encoded = is_encoded(response, target.name)
        if resumed and (encoded or not _is_rest(response, start, headers.get("If-Range", ""))):
            part.unlink(missing_ok=True)
            raise TryAgainError("the server sent another range, or version, than the one asked for", 0.0)
        done = start if resumed else 0
        total = 0 if encoded else _total(response, done)
        if total and remote.num_bytes and total != remote.num_bytes:
            raise DownloadError(
                f"{remote.shown} offers {total:,} bytes, but {remote.num_bytes:,} are stated by {remote.stated_by}: "
                "nothing was downloaded. Check the mirror; accept_changed=true takes the file as it is."
            )
        write_json(_notes(target), {"url": remote.shown, "version": "" if encoded else _version(response)})
        with part.open("ab" if start and resumed else "wb") as stream:
            report(done, total)
            # as it comes: with a chunk size, what a cut leaves over would be lost
            for chunk in response.iter_bytes() if encoded else response.iter_raw():
                stream.write(chunk)
                done += len(chunk)
                report(done, total)
        if total and done < total:
            raise TryAgainError(f"the connection ended after {done:,} of {total:,} bytes")
        if not done:
            raise TryAgainError("the answer is empty")
        return _stated_md5(response)


def _resume_headers(remote: Remote, target: Path) -> tuple[int, dict[str, str]]:
    """Where the request begins, and its headers."""
    headers = {"Accept-Encoding": "identity", **remote.headers}
    start = size_of(part_of(target))
    known = (read_json_object(_notes(target)) or {}) if start else {}
    if known.get("url") != remote.shown or not (known.get("version") or remote.sha256):
        return 0, headers
    headers["Range"] = f"bytes={start}-"
    if known.get("version"):
        headers["If-Range"] = known["version"]
    return start, headers


def _is_rest(response: httpx.Response, start: int, version: str) -> bool:
    """Whether a range begins where it should, and is of the version: some servers do not look at ``If-Range``."""
    if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        return False
    told_by = "ETag" if version.startswith('"') else "Last-Modified"
    return not version or response.headers.get(told_by, version) == version


def _total(response: httpx.Response, start: int) -> int:
    """Bytes of the whole file; 0 where the server does not say."""
    ranged = response.headers.get("Content-Range", "").rpartition("/")[2]
    if ranged.isdigit():
        return int(ranged)
    length = response.headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() and response.is_success else 0


def _version(response: httpx.Response) -> str:
    """Version of the file for ``If-Range``: a strong ETag, or the time of its last change."""
    tag: str = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else str(response.headers.get("Last-Modified", ""))


def _stated_md5(response: httpx.Response) -> str:
    """MD5 in hexadecimal of the whole file, as Google Cloud Storage states it (``x-goog-hash``).

    Of what is stored compressed, it states that of the compressed bytes.
    """
    if response.headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return ""
    for entry in response.headers.get("x-goog-hash", "").split(","):
        name, _, value = entry.strip().partition("=")
        if name == "md5":
            try:
                return base64.b64decode(value, validate=True).hex()
            except binascii.Error:
                return ""
    return ""


def _notes(target: Path) -> Path:
    return target.with_name(f".{target.name}.part.json")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where it is missing."""
    return path.stat().st_size if path.exists() else 0
