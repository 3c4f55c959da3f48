"""Files on a local disk or in any object storage, behind pyarrow's file systems.

A *place* is a local path or a URI (``s3://``, ``gs://``, ``hdfs://``, ``file://``, or any protocol that fsspec knows).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.settings import SettingsError

logger = logging.getLogger(__name__)

COPY_BYTES = 8 << 20
DRAFT_ENDING = ".tmp"
_UNPACK_BYTES = 4 << 10


class DiskFullError(ValueError):
    """There is no room for the output; what is finished stays, and the same command goes on from there.

    A ``ValueError`` like every mistake that the user can mend, so that entry scripts show its sentence alone.
    """


@dataclass(frozen=True)
class FoundFile:
    """One input file.

    Attributes:
        place: local path or URI.
        name: path relative to the folder that all found files share; for messages and ids.
        num_bytes: its size.
        modified_ns: when it was changed last, 0 where the storage does not say.
    """

    place: str
    name: str
    num_bytes: int
    modified_ns: int


def resolve(place: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a place, and the path within it.

    Raises:
        SettingsError: nothing here can open the protocol.
    """
    protocol, separator, rest = place.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), str(Path(place).expanduser().absolute())
    if protocol == "file":
        return pafs.LocalFileSystem(), rest
    if "/" not in rest.strip("/") or "::" in place:
        return _connect(place)
    filesystem, folder = _connect(parent(place))
    return filesystem, f"{folder.rstrip('/')}/{file_name(place)}"


@functools.lru_cache(maxsize=256)
def _connect(place: str) -> tuple[pafs.FileSystem, str]:
    """The same for a folder that is not on this disk; kept, because each connection costs many round trips."""
    try:
        return pafs.FileSystem.from_uri(place)
    except (ValueError, OSError):
        pass  # not one of pyarrow's own; fsspec knows more
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"cannot open {place!r}: {error}; use a local path or a URI of a known protocol."
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def is_local(place: str) -> bool:
    """Whether a place lies on this machine's disk."""
    return "://" not in place or place.startswith("file://")


def join(place: str, *names: str) -> str:
    """A place below another one."""
    place, query = _split_query(place) if "://" in place else (place, "")
    return "/".join([place.rstrip("/"), *names]) + query


def parent(place: str) -> str:
    """The folder of a place."""
    path, query = _split_query(place) if "://" in place else (place, "")
    return path.rsplit("/", 1)[0] + query


def file_name(place: str) -> str:
    """The last part of a place."""
    path, _ = _split_query(place) if "://" in place else (place, "")
    return path.rsplit("/", 1)[-1]


def find_files(pattern: str) -> list[FoundFile]:
    """All files that a pattern names, in a fixed order.

    Args:
        pattern: place with ``*``, ``?``, ``[..]``, ``{a,b}`` and ``{00000..00012}``; a plain file is found as itself.

    Returns:
        Files, sorted by place; empty where nothing matches. A warning tells what was named one by one and is missing.
    """
    found: dict[str, pafs.FileInfo] = {}
    missing: list[str] = []
    places = expand_braces(pattern)
    for place, infos in zip(places, _matching(places), strict=True):
        _, path = resolve(place)
        found |= {_place_of(place, path, info.path): info for info in infos}
        if not infos:
            missing.append(place)
    if not found:
        return []
    if missing:
        logger.warning("%d of %d are missing: %s ..", len(missing), len(places), ", ".join(missing[:3]))
    common = _common_folder(list(found))
    return [
        FoundFile(place, place[len(common) :].lstrip("/"), info.size or 0, info.mtime_ns or 0)
        for place, info in sorted(found.items())
    ]


def expand_braces(pattern: str) -> list[str]:
    """``{a,b}`` and ``{000..012}`` written out, leftmost first; numbers keep the width of the first bound."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1])
        parts = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    elif "," in match[1]:
        parts = match[1].split(",")
    else:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return list(itertools.chain.from_iterable(expand_braces(head + part + tail) for part in parts))


def exists(place: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(place)
    return filesystem.get_file_info(path).type != pafs.FileType.NotFound


def is_folder(place: str) -> bool:
    """Whether a folder is there."""
    filesystem, path = resolve(place)
    return filesystem.get_file_info(path).type == pafs.FileType.Directory


def read_bytes(place: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: it is missing.
    """
    filesystem, path = resolve(place)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def draft_of(target: Path) -> Path:
    """A new name beside a local file, to write it under before it is renamed.

    No two drafts share a name: a worker that a dead run left behind must not write into the file of its successor.
    """
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{DRAFT_ENDING}")


def remove_drafts(folder: str) -> None:
    """Remove what interrupted runs left unfinished in a folder."""
    for name in list_names(folder):
        if name.startswith(".") and name.endswith(DRAFT_ENDING):
            remove_file(join(folder, name))


def write_atomically(place: str, data: bytes | memoryview) -> None:
    """Write a file so that it is either absent or whole, also after a kill.

    Raises:
        DiskFullError: there is no room.
    """
    filesystem, path = resolve(place)
    with disk_full_as_error(place):
        if not is_local(place):  # object storage shows an object only when it is complete
            with filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        draft = draft_of(target)
        draft.write_bytes(data)
        draft.replace(target)


def write_lines(place: str, lines: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines so that the file is either absent or whole; returns how many."""
    filesystem, path = resolve(place)
    draft = str(draft_of(Path(path))) if is_local(place) else path
    count = 0
    with disk_full_as_error(place):
        with filesystem.open_output_stream(draft) as stream:
            for count, line in enumerate(lines, start=1):  # noqa: B007 - counted
                stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        if draft != path:
            Path(draft).replace(path)
    return count


def sha256(place: str) -> str:
    """SHA-256 of a file in hexadecimal; empty where it is missing."""
    filesystem, path = resolve(place)
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(COPY_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def make_folder(place: str) -> None:
    """Make a folder and those above it."""
    filesystem, path = resolve(place)
    filesystem.create_dir(path, recursive=True)


def remove_folder(place: str) -> None:
    """Remove a folder with everything in it; a missing one is fine."""
    filesystem, path = resolve(place)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def remove_file(place: str) -> None:
    """Remove a file; a missing one is fine."""
    filesystem, path = resolve(place)
    if filesystem.get_file_info(path).type == pafs.FileType.File:
        filesystem.delete_file(path)


def list_names(folder: str) -> dict[str, int]:
    """Names of the files directly in a folder, with their sizes in bytes; empty where the folder is missing."""
    filesystem, path = resolve(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return {info.base_name: info.size or 0 for info in infos if info.type == pafs.FileType.File}


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, sorted; empty where the folder is missing."""
    filesystem, path = resolve(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)


def num_bytes(place: str) -> int:
    """Size of a file; -1 where there is none."""
    filesystem, path = resolve(place)
    info = filesystem.get_file_info(path)
    return info.size if info.type == pafs.FileType.File and info.size is not None else -1


def link_or_copy(source: str, target: str) -> None:
    """Give a file a second name; a copy where the storage has no hard links. Replaces ``target``."""
    filesystem, path = resolve(source)
    _, target_path = resolve(target)
    with disk_full_as_error(target):
        if not is_local(source):
            filesystem.copy_file(path, target_path)
            return
        draft = draft_of(Path(target_path))
        try:
            draft.hardlink_to(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(path, draft)
        draft.replace(target_path)


def download(place: str, target: Path) -> None:
    """Copy a file of any storage, as it is, to a local path."""
    filesystem, path = resolve(place)
    with disk_full_as_error(str(target)), filesystem.open_input_stream(path, compression=None) as source:
        _copy_stream(source, target)


def unpack(path: Path) -> Path:
    """Unpack a gzip, bzip2 or zstd file beside itself; a damaged one gives what comes before the damage."""
    target = path.with_suffix("")
    with disk_full_as_error(str(target)), pa.input_stream(str(path), compression="detect") as source:
        try:
            _copy_stream(source, target, _UNPACK_BYTES)  # the chunk in which the damage lies is lost
        except OSError as error:
            if error.errno is not None:
                raise  # the disk, not the file
    return target


def _copy_stream(source: pa.NativeFile, target: Path, chunk_bytes: int = COPY_BYTES) -> None:
    with target.open("wb") as sink:
        while chunk := source.read(chunk_bytes):
            sink.write(chunk)


class disk_full_as_error:
    """Turn "no space left on device" into one clear sentence."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Raise ``DiskFullError`` instead of the system's error."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"no space left while writing {self.place}: free some, and run the same command again; "
                "what is finished is kept."
            ) from error


def safe_path(folder: str, name: str) -> str | None:
    """A file below a folder, or None where the name climbs out of it."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts:
        return None
    return join(folder, *parts)


def _matching(places: list[str]) -> Iterator[list[pafs.FileInfo]]:
    """Files that each place names: itself, or those that match its wildcards. Asks once for all plain places."""
    resolved = [resolve(place) for place in places]
    plain = resolved[0][0].get_file_info([path for _, path in resolved])  # they differ in what their braces held
    for (filesystem, path), info in zip(resolved, plain, strict=True):
        parts = path.split("/")
        first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
        if info.type == pafs.FileType.File:
            yield [info]
        elif first is None:
            yield []
        else:
            yield list(_walk(filesystem, "/".join(parts[:first]) or "/", parts[first:]))


def _walk(filesystem: pafs.FileSystem, folder: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
    """Files below ``folder`` whose path matches ``parts``, one pattern per level."""
    for info in filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if not fnmatchcase(info.base_name, parts[0]):
            continue
        if len(parts) > 1 and info.type == pafs.FileType.Directory:
            yield from _walk(filesystem, info.path, parts[1:])
        elif len(parts) == 1 and info.type == pafs.FileType.File:
            yield info


def _place_of(pattern: str, pattern_path: str, found_path: str) -> str:
    """Put the protocol, host and query of the pattern back around a path that the file system returned."""
    protocol, separator, rest = pattern.partition("://")
    if not separator or protocol == "file":
        return found_path
    rest, query = _split_query(rest)
    if not rest.endswith(pattern_path):  # a file system that begins its paths with a slash of its own
        pattern_path, found_path = pattern_path.lstrip("/"), found_path.lstrip("/")
    return f"{protocol}://{rest.removesuffix(pattern_path)}{found_path}{query}"


def _split_query(place: str) -> tuple[str, str]:
    """A place and its query (``?endpoint_override=..``); a lone ``?`` is a wildcard."""
    match = re.search(r"\?\w+=", place)
    return (place[: match.start()], place[match.start() :]) if match else (place, "")


def _common_folder(places: list[str]) -> str:
    folders = [place.rsplit("/", 1)[0].split("/") for place in places]
    common = [parts[0] for parts in zip(*folders, strict=False) if len(set(parts)) == 1]
    prefix = next((i for i, parts in enumerate(zip(*folders, strict=False)) if len(set(parts)) > 1), len(common))
    return "/".join(common[:prefix]) + "/"
