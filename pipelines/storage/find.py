"""Files by pattern: wildcards, alternatives and number ranges, on a disk or in an object storage, in a fixed order."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import pyarrow.fs as pafs

from pipelines.storage.location import Location, resolve
from pipelines.storage.retry import with_retries

logger = logging.getLogger(__name__)

_WILDCARD = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"[*?\[{]")

_MOST_ASKED = 100
"""Names in one folder that are asked for one by one; where there are more, the folder is listed."""

_Listed = Callable[[str], list[pafs.FileInfo]]
"""What a folder holds."""


@dataclass(frozen=True)
class FoundFile:
    """One input file.

    Attributes:
        location: the file.
        name: path relative to the folder that all found files share; for messages and ids.
        num_bytes: its size.
        modified_ns: when it was changed last, 0 where the storage does not say.
    """

    location: Location
    name: str
    num_bytes: int
    modified_ns: int


def find_files(pattern: str | Location, *, tells_missing: bool = True) -> list[FoundFile]:
    """All files that a pattern names, in a fixed order.

    Args:
        pattern: with ``*``, ``?``, ``[..]``, ``{a,b}`` and ``{00000..00012}``. A file or folder that exists is taken as
            it is named, whatever characters its name holds. Hidden files match only a pattern that begins with a dot.
        tells_missing: warn of what the pattern names one by one and is missing.

    Returns:
        Files, sorted by location; empty where nothing matches.
    """
    location = Location.parse(pattern)
    filesystem, path = resolve(location)
    found: dict[str, pafs.FileInfo] = {}
    itself = with_retries(location, lambda: filesystem.get_file_info(path))
    if itself.type == pafs.FileType.File:
        found[path] = itself
    elif itself.type == pafs.FileType.NotFound:
        base, rest = with_retries(location, lambda: _split_existing(filesystem, path))
        names = expand_braces(rest)
        matches = with_retries(location, lambda: list(_matching(filesystem, base, names)))
        missing: list[str] = []
        for name, infos in zip(names, matches, strict=True):
            found |= {info.path: info for info in infos}
            if not infos:
                missing.append(name)
        if found and missing and tells_missing:
            logger.warning("%d of %d are missing: %s ..", len(missing), len(names), ", ".join(missing[:3]))
    if not found:
        return []
    prefix = path.removesuffix(location.path)  # what the file system puts before the path
    common = _common_folder(list(found))
    return [
        FoundFile(
            Location(location.root, _without_prefix(found_path, prefix)),
            found_path[len(common) :].lstrip("/"),
            info.size or 0,
            info.mtime_ns or 0,
        )
        for found_path, info in sorted(found.items())
    ]


def find_below(location: str | Location) -> list[FoundFile]:
    """All files below a folder, at any depth, by name; a file is found itself, with an empty name."""
    location = Location.parse(location)
    filesystem, path = resolve(location)
    itself = with_retries(location, lambda: filesystem.get_file_info(path))
    if itself.type == pafs.FileType.File:
        return [FoundFile(location, "", itself.size or 0, itself.mtime_ns or 0)]
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = with_retries(location, lambda: filesystem.get_file_info(selector))
    start = path.rstrip("/") + "/"
    named = {_without_prefix(info.path, start): info for info in infos if info.type == pafs.FileType.File}
    return [
        FoundFile(location / name, name, info.size or 0, info.mtime_ns or 0) for name, info in sorted(named.items())
    ]


def _without_prefix(path: str, prefix: str) -> str:
    """Some file systems begin the paths that they list with a slash of their own, some leave it out."""
    return path.removeprefix(prefix) if path.startswith(prefix) else path.lstrip("/").removeprefix(prefix.lstrip("/"))


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


def _split_existing(filesystem: pafs.FileSystem, path: str) -> tuple[str, str]:
    """A pattern as a folder that exists, whatever characters its name holds, and the rest, which is a pattern."""
    parts = path.split("/")
    number = 0
    for number, part in enumerate(parts):
        if not _SPECIAL.search(part):
            continue
        folder = "/".join(parts[: number + 1])
        if _WILDCARD.match(part) or filesystem.get_file_info(folder).type != pafs.FileType.Directory:
            break
    return "/".join(parts[:number]), "/".join(parts[number:])


def _matching(filesystem: pafs.FileSystem, base: str, names: list[str]) -> Iterator[list[pafs.FileInfo]]:
    """Files below ``base`` that each name matches."""
    # Once for all names: a folder of a hundred thousand objects is a hundred requests.
    listed = cache(lambda folder: filesystem.get_file_info(pafs.FileSelector(folder or "/", allow_not_found=True)))
    plain = [name for name in names if not _WILDCARD.search(name)]
    per_folder = Counter(name.rpartition("/")[0] for name in plain)
    # In a bucket, each name that is asked for is a request of its own, and a listing has a thousand.
    asked = [name for name in plain if per_folder[name.rpartition("/")[0]] <= _MOST_ASKED]
    infos = dict(zip(asked, filesystem.get_file_info([f"{base}/{name}" for name in asked]), strict=True))
    for folder, number in per_folder.items():
        if number > _MOST_ASKED:
            found = listed(f"{base}/{folder}".rstrip("/"))
            infos |= {f"{folder}/{info.base_name}".lstrip("/"): info for info in found}
    known = set(plain)
    for name in names:
        if name in known:
            yield [infos[name]] if name in infos and infos[name].type == pafs.FileType.File else []
        else:
            yield list(_walk(listed, base, name.split("/")))


def _walk(listed: _Listed, folder: str, parts: list[str]) -> Iterator[pafs.FileInfo]:
    """Files below ``folder`` whose path matches ``parts``, one pattern per level."""
    infos = listed(folder)
    exact = [info for info in infos if info.base_name == parts[0]]
    for info in exact or infos:
        if not exact and not _matches(info.base_name, parts[0]):
            continue
        if len(parts) > 1 and info.type == pafs.FileType.Directory:
            yield from _walk(listed, info.path, parts[1:])
        elif len(parts) == 1 and info.type == pafs.FileType.File:
            yield info


def _matches(name: str, pattern: str) -> bool:
    """``*`` does not match hidden files: macOS leaves ``._name`` beside files on other systems' disks."""
    return fnmatchcase(name, pattern) and not (name.startswith(".") and not pattern.startswith("."))


def _common_folder(paths: list[str]) -> str:
    folders = [path.rsplit("/", 1)[0].split("/") for path in paths]
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in common) + "/"
