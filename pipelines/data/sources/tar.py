"""Images and captions as img2dataset and webdataset write them: tar shards, or folders of files.

    000000000.jpg  000000000.json  000000000.txt  000000001.jpg ..

A scan finds where each member is, then samples are read one by one. So members of a sample may be apart, memory does
not grow with the images, and a tar that is cut off or damaged gives all that can still be found.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines import storage
from pipelines.data.sources.base import (
    Changes,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    rejection,
    shorten,
    unpack_hint,
)
from pipelines.data.sources.drafts import Draft, make_row
from pipelines.data.sources.images import IMAGE_EXTENSIONS, check_image_name
from pipelines.data.sources.tar_scan import Member, TarScan
from pipelines.settings import SettingsError
from tinygptv.data.sample import Turn

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""Key and extension: the file name is cut at its first dot, as webdataset does."""

_SYSTEM_FILES = re.compile(
    r"(?:.*/)?(?:\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)|(?:.*/)?__MACOSX/.*", re.IGNORECASE | re.DOTALL
)
"""Files that operating systems add to folders: no samples."""

_CAPTION_FIELDS = ("caption", "text", "TEXT")
_MOST_TEXT_BYTES = 16 << 20

Data = Callable[[], bytes]
"""Reads a member."""


@dataclass
class Group:
    """Members of one sample.

    Attributes:
        key: what their names share.
        members: extension -> the member's data.
        problem: why the sample cannot be used; empty where nothing is wrong yet.
        cut: says so where the tar ends inside one of the members, which is then left out.
    """

    key: str
    members: dict[str, Data] = field(default_factory=dict)
    problem: str = ""
    cut: str = ""


@dataclass(frozen=True)
class TarReader:
    """A family of captioned shards.

    Attributes:
        extensions: image members that are used; others are set apart.
        captions: where the caption is, first usable one wins: ``json`` (field ``caption``) or ``txt``.
    """

    extensions: tuple[str, ...] = ("jpg", "jpeg")
    captions: tuple[str, ...] = ("json",)

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """One unit per tar, or per folder of files."""
        given = storage.Location.parse(source.input) if source.input else None
        if given is not None and storage.is_folder(given) and not _find_tars(given):
            folders = list(_sample_folders(given))
            if not folders:
                raise SettingsError(
                    f"input={source.input!r} holds neither tars nor images with captions (key.jpg beside key.json)"
                    f"{unpack_hint(given)}."
                )
            for folder, name in folders:
                yield SourceUnit(source, folder, f"{name}.files", num_bytes=sum(storage.list_names(folder).values()))
            return
        for file in find_input(source, *_TARS):
            yield SourceUnit.of_file(source, file)

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Samples of one tar, in its order, then what could not be read."""
        if unit.shard.endswith(".files"):
            yield from self._rows(unit, _folder_groups(unit.file), changes)
            return
        with _local_copy(unit.file) as (path, damage), path.open("rb") as tar:
            scan = TarScan(tar, path.stat().st_size)
            yield from self._rows(unit, _tar_groups(scan), changes)
            for problem in [*([damage] if damage else []), *scan.problems]:
                yield Rejected("", unit.shard, problem)

    def _rows(self, unit: SourceUnit, groups: list[Group], changes: Changes | None) -> Iterator[ReadResult]:
        for group in groups:
            try:
                yield self._row(unit, group, changes)
            except Exception as error:  # whatever is in a sample costs that sample alone
                found = rejection(unit, group.key, error)
                yield Rejected(group.key, unit.shard, "; ".join(filter(None, (group.cut, found.reason))), found.filter)
            else:
                if group.cut:  # in a member that the sample did not need
                    yield Rejected("", unit.shard, group.cut)

    def _row(self, unit: SourceUnit, group: Group, changes: Changes | None) -> ReadResult:
        if group.problem:
            raise Malformed(group.problem)
        extension = next((name for name in self.extensions if name in group.members), None)
        if extension is None:
            found = sorted(IMAGE_EXTENSIONS & set(group.members))
            what = f", only .{found[0]}: source=webdataset reads other formats" if found else ""
            raise Malformed(f"no .{self.extensions[0]} member{what}")
        caption = self._caption(group)
        image = group.members[extension]()
        check_image_name(f"{shorten(group.key)}.{extension}", image)
        draft = Draft((Turn("", (caption,)),), image, task=unit.source.task or "pair", cleans_answers=True)
        return make_row(unit, group.key, draft, None, changes)

    def _caption(self, group: Group) -> str:
        """The first caption that can be used; damage to either text is damage to the sample.

        Raises:
            Malformed: there is none.
        """
        texts = {kind: _read_text(group, kind) for kind in self.captions if kind in group.members}
        if "txt" in group.members and "txt" not in texts:
            _read_text(group, "txt")  # the same caption again, where img2dataset wrote both
        if not texts:
            raise Malformed(f"no .{' or .'.join(self.captions)} member with a caption")
        problem = ""
        for kind, text in texts.items():
            if kind == "txt":
                return text
            caption, problem = _json_caption(text)
            if caption is not None:
                return caption
        raise Malformed(problem)


_DECODE = json.JSONDecoder(strict=False).decode
"""``json.loads`` makes a decoder per text where it is given an argument: half of the time."""


def _json_caption(text: str) -> tuple[str | None, str]:
    """The caption in a .json member, or why there is none."""
    try:
        fields = _DECODE(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the .json member is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        return None, f"the .json member is no object but {type(fields).__name__}"
    named = [name for name in _CAPTION_FIELDS if fields.get(name) is not None]
    if not named:
        return None, f"the .json member has no caption among {shorten(', '.join(map(str, fields)) or 'no fields')}"
    caption: Any = fields[named[0]]
    if not isinstance(caption, str):
        return None, f"the caption is no text but {type(caption).__name__}"
    return caption, ""


def _tar_groups(scan: TarScan) -> list[Group]:
    """Samples of a tar in the order of their first members."""
    groups: list[Group] = []
    open_groups: dict[str, Group] = {}
    for member in scan.members():
        if not member.is_folder and not _SYSTEM_FILES.fullmatch(member.name.removeprefix("./")):
            _add_member(groups, open_groups, member, scan)
    return [part for group in groups for part in _split_dotted(group)]


def _add_member(groups: list[Group], open_groups: dict[str, Group], member: Member, scan: TarScan) -> None:
    name = member.name.removeprefix("./")
    match = _NAME.fullmatch(name)
    key, extension = (match[1], match[2].lower()) if match else (name, "")
    group = open_groups.get(key)
    if group is None or extension in group.members:
        repeated = group is not None
        group = open_groups[key] = Group(key)
        groups.append(group)
        if repeated:
            group.problem = "duplicate key: an earlier sample of this tar has the same one"
    if member.start + member.size > scan.num_bytes:
        group.cut = f"the tar is cut off inside member {shorten(name)}"
    else:
        group.members[extension] = lambda: _read_member(scan, member)
    group.problem = group.problem or _member_problem(name, extension, member)


def _read_member(scan: TarScan, member: Member) -> bytes:
    scan.file.seek(member.start)
    return scan.file.read(member.size)


def _member_problem(name: str, extension: str, member: Member) -> str:
    if name.startswith("/") or (".." in name and ".." in PurePosixPath(name).parts):
        return f"member {shorten(name)} is outside of its folder"
    if not extension:
        return f"member {shorten(name)} is not named key.extension"
    if not member.is_file:
        return f"member {shorten(name)} is a link or device, not a file"
    if not name.isascii() and any("\udc80" <= character <= "\udcff" for character in name):
        return "the member's name is not UTF-8"
    return ""


def _split_dotted(group: Group) -> list[Group]:
    """Samples whose keys have dots: ``a.1.jpg``, ``a.1.json``, ``a.2.jpg`` fall into one group by webdataset's rule.

    What has an image directly under the group's key is a sample as webdataset means it, with more members.
    """
    if group.problem or any(extension in IMAGE_EXTENSIONS for extension in group.members):
        return [group]
    parts: dict[str, Group] = {}
    for extension, data in group.members.items():
        middle, _, last = extension.rpartition(".")
        key = f"{group.key}.{middle}" if middle else group.key
        parts.setdefault(key, Group(key, cut=group.cut)).members[last] = data
    if not any(set(part.members) & IMAGE_EXTENSIONS for part in parts.values()):
        return [group]
    return list(parts.values())


def _folder_groups(folder: storage.Location) -> list[Group]:
    """Samples of a folder of files, in the order of their names."""
    groups: dict[str, Group] = {}
    for name in sorted(storage.list_names(folder)):
        key, dot, extension = name.rpartition(".")
        extension = extension.lower()
        if dot and key and not name.startswith(".") and extension in {*IMAGE_EXTENSIONS, "json", "txt"}:
            group = groups.setdefault(key, Group(key))
            if extension in group.members:  # a.jpg beside a.JPG
                group.problem = f"file {shorten(name)} is its second .{extension} file"
            group.members[extension] = partial(storage.read_bytes, folder / name)
    return list(groups.values())


def _read_text(group: Group, extension: str) -> str:
    data = group.members[extension]()
    if len(data) > _MOST_TEXT_BYTES:
        raise Malformed(f"the .{extension} member has {len(data):,} bytes")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()  # Python's own codec utf-8-sig takes five times as long
    except UnicodeDecodeError as error:
        raise Malformed(f"the .{extension} member is not UTF-8 text (byte {error.start})") from error


_TARS = ("*.{tar,tar.gz,tgz,tar.bz2,tar.zst,tar.xz}", "*/*.{tar,tar.gz,tgz,tar.bz2,tar.zst,tar.xz}")


def _find_tars(folder: storage.Location) -> list[storage.FoundFile]:
    return next(filter(None, (storage.find_files(folder / pattern, tells_missing=False) for pattern in _TARS)), [])


def _sample_folders(folder: storage.Location) -> Iterator[tuple[storage.Location, str]]:
    """Folders of samples: itself, or those directly in it, as img2dataset's ``files`` output has them."""
    for candidate, name in [(folder, folder.name), *((folder / n, n) for n in storage.list_folders(folder))]:
        endings = {file.rpartition(".")[2].lower() for file in storage.list_names(candidate)}
        if not name.startswith(".") and endings & IMAGE_EXTENSIONS and endings & {"json", "txt"}:
            yield candidate, name


@contextmanager
def _local_copy(location: storage.Location) -> Iterator[tuple[Path, str]]:
    """The tar as a plain local file, and what is wrong with its compression: itself where it is plain and local."""
    if location.is_local and not storage.compression_of(location):
        yield Path(location.path), ""
        return
    with tempfile.TemporaryDirectory(prefix="tar-") as folder:
        copy = Path(folder, "shard.tar")
        damage = storage.unpack(location, copy)
        yield copy, damage
