"""Tar shards of images and captions, as img2dataset and webdataset write them: ``key.jpg``, ``key.json``, ``key.txt``.

A scan of the headers finds where each member lies, then samples are read one by one. So members of a sample may lie
apart, memory does not grow with the images, and a tar that is cut off or damaged gives all that can still be found.
"""

from __future__ import annotations

import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pipelines import storage
from pipelines.data.sources.base import (
    IMAGE_EXTENSIONS,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    check_image_name,
    find_input,
)
from tinygptv.data.prompts import clean_caption
from tinygptv.data.sample import SampleRow, Turn

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""Key and extension: the file name is cut at its first dot, as webdataset does."""


@dataclass
class Group:
    """Members of one sample.

    Attributes:
        key: what their names share.
        members: extension -> (first byte, size).
        problem: why the sample cannot be used; empty where nothing is wrong yet.
        cut: says so where the tar ends inside one of the members, which is then left out.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""
    cut: str = ""


@dataclass
class TarIndex:
    """What a scan found: samples in the order of their first members, and the places that could not be read."""

    groups: list[Group] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TarReader:
    """A family of captioned tar shards.

    Attributes:
        extensions: image members that are used; others are set apart.
        captions: where the caption stands, first match wins: ``json`` (field ``caption``) or ``txt``.
        task: task of the rows.
    """

    extensions: tuple[str, ...] = ("jpg", "jpeg")
    captions: tuple[str, ...] = ("json",)
    task: str = "pair"

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per tar."""
        for file in find_input(location, "*.tar"):
            yield SourceUnit(location, file.place, file.name, num_bytes=file.num_bytes, modified_ns=file.modified_ns)

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """Samples of one tar, in its order, then what could not be read."""
        with _local_copy(unit.place) as path, path.open("rb") as tar:
            index = scan_tar(tar, path.stat().st_size)
            for group in index.groups:
                try:
                    yield self._row(unit, group, tar)
                except Malformed as error:
                    reason = "; ".join(filter(None, (group.cut, str(error))))
                    yield Rejected(_printable(group.key), unit.shard, reason)
                else:
                    if group.cut:  # in a member that the sample did not need
                        yield Rejected("", unit.shard, group.cut)
            for problem in index.problems:
                yield Rejected("", unit.shard, problem)

    def _row(self, unit: SourceUnit, group: Group, tar: BinaryIO) -> SampleRow:
        if group.problem:
            raise Malformed(group.problem)
        extension = next((name for name in self.extensions if name in group.members), None)
        if extension is None:
            found = sorted(IMAGE_EXTENSIONS & set(group.members))
            what = f", only .{found[0]}: source=webdataset reads other formats" if found else ""
            raise Malformed(f"no .{self.extensions[0]} member{what}")
        caption = self._caption(group, tar)
        image = _read_member(tar, group, extension)
        check_image_name(f"{group.key}.{extension}", image)
        location = unit.location
        return SampleRow(
            id=unit.row_id(group.key),
            source=location.name,
            task=location.task or self.task,
            turns=(Turn("", (clean_caption(caption),)),),
            image=image,
        )

    def _caption(self, group: Group, tar: BinaryIO) -> str:
        kind = next((kind for kind in self.captions if kind in group.members), None)
        if kind is None:
            raise Malformed(f"no .{self.captions[0]} member with a caption")
        text = _read_text(tar, group, kind)
        if kind == "txt":
            return text
        if "txt" in group.members:
            _read_text(tar, group, "txt")  # the same caption again; damage to it is damage to the sample
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Malformed(f"the .json member is no valid JSON: {error}") from error
        if not isinstance(fields, dict) or "caption" not in fields:
            raise Malformed("the .json member has no caption")
        if not isinstance(fields["caption"], str):
            raise Malformed(f"the caption is no text but {type(fields['caption']).__name__}")
        return fields["caption"]


def scan_tar(tar: BinaryIO, num_bytes: int) -> TarIndex:
    """Find every sample of a tar without reading its data.

    Args:
        tar: seekable, at its start.
        num_bytes: size of the file.

    Returns:
        Samples and problems; never raises for what is in the file.
    """
    index = TarIndex()
    if num_bytes == 0:
        index.problems.append("the tar is empty (0 bytes)")
        return index
    open_groups: dict[str, Group] = {}
    end, cut = 0, False
    for member in _members(tar, index):
        if member.offset > end and _damaged(tar, end, member.offset):
            index.problems.append(f"the tar is damaged: bytes {end} to {member.offset} hold no readable member")
        cut = member.offset_data + member.size > num_bytes  # its sample says so
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not member.isdir():
            _add_member(index, open_groups, member, num_bytes)
    if end == 0 and not index.problems and _damaged(tar, 0, num_bytes):
        index.problems.append("the file is no tar, or its first header is damaged")
    elif 0 < end < num_bytes and _damaged(tar, end, num_bytes):
        index.problems.append(f"the tar is cut off or damaged after byte {end}: nothing readable follows")
    elif end and num_bytes < end + tarfile.BLOCKSIZE and not cut:
        index.problems.append("the tar has no end mark, so it may be cut off between two samples")
    return index


def _members(tar: BinaryIO, index: TarIndex) -> Iterator[tarfile.TarInfo]:
    """Headers, going on after damaged ones."""
    try:
        # ignore_zeros makes tarfile look for the next header where one is broken, instead of stopping without a word.
        archive = tarfile.open(  # noqa: SIM115  (the file belongs to the caller)
            fileobj=tar, mode="r:", ignore_zeros=True, errors="surrogateescape"
        )
    except (tarfile.TarError, ValueError, OSError):
        return
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError:
            return  # the data of the last member ends before its size says: noticed there
        except (tarfile.TarError, ValueError, OSError) as error:
            index.problems.append(f"the tar cannot be read further: {error}")
            return
        if member is None:
            return
        archive.members.clear()  # or the archive would remember all of them
        yield member


def _add_member(index: TarIndex, open_groups: dict[str, Group], member: tarfile.TarInfo, num_bytes: int) -> None:
    name = member.name.removeprefix("./")
    match = _NAME.fullmatch(name)
    key, extension = (match[1], match[2].lower()) if match else (name, "")
    group = open_groups.get(key)
    if group is None or extension in group.members:
        repeated = group is not None
        group = open_groups[key] = Group(key)
        index.groups.append(group)
        if repeated:
            group.problem = "duplicate key: an earlier sample of this tar has the same one"
    if member.offset_data + member.size > num_bytes:
        group.cut = f"the tar is cut off inside member {_printable(name)}"
    else:
        group.members[extension] = (member.offset_data, member.size)
    group.problem = group.problem or _member_problem(name, extension, member)


def _member_problem(name: str, extension: str, member: tarfile.TarInfo) -> str:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return f"member {_printable(name)} climbs out of its folder"
    if not extension:
        return f"member {_printable(name)} is not named key.extension"
    if not member.isreg():
        return f"member {_printable(name)} is a link or device, not a file"
    if _printable(name) != name:
        return "the member's name is not UTF-8"
    return ""


def _read_member(tar: BinaryIO, group: Group, extension: str) -> bytes:
    start, size = group.members[extension]
    tar.seek(start)
    return tar.read(size)


def _read_text(tar: BinaryIO, group: Group, extension: str) -> str:
    try:
        return _read_member(tar, group, extension).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"the .{extension} member is not UTF-8 text (byte {error.start})") from error


def _damaged(tar: BinaryIO, start: int, stop: int) -> bool:
    """Whether there is anything but zeros (padding, end marks) between two places; leaves the position as it was."""
    before = tar.tell()
    tar.seek(start)
    left = stop - start
    found = False
    while left > 0 and not found:
        chunk = tar.read(min(left, storage.COPY_BYTES))
        if not chunk:
            break
        found = chunk.count(0) != len(chunk)
        left -= len(chunk)
    tar.seek(before)
    return found


def _printable(text: str) -> str:
    """Text that can be written as UTF-8, whatever bytes the name was made of."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def _local_copy(place: str) -> Iterator[Path]:
    """The tar as a plain local file: itself where it is one, else a copy that is removed afterwards."""
    packed = place.endswith((".gz", ".bz2", ".zst"))
    if storage.is_local(place) and not packed:
        yield Path(storage.resolve(place)[1])
        return
    with tempfile.TemporaryDirectory(prefix="tar-") as folder:
        copy = Path(folder, storage.file_name(place))
        storage.download(place, copy)
        yield storage.unpack(copy) if packed else copy
