"""Shared by all sources: units of work, rows, and the ways in which a sample can be set apart.

A reader has two halves. ``plan`` looks at the input and cuts it into units: one per tar, or one per slice of an
annotation file. It runs once, in the driver, and reads no image. ``read`` turns one unit into rows; it runs wherever
there is a free CPU. Which units there are depends on the input alone, so the result never depends on how many workers
share them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines import storage
from pipelines.settings import SettingsError
from tinygptv.data.sample import SampleRow

ENTRIES_PER_UNIT = 1000
"""Annotation entries of one unit; small enough to share out, large enough that starting a task does not matter."""

LONGEST_REASON = 300
LONGEST_NAME = 100


@dataclass(frozen=True)
class SourceInput:
    """The input of one ingest.

    Attributes:
        source: key of ``SOURCES``.
        input: tar glob, annotation file or folder.
        images: image folder; empty where the input holds the images, or where they are looked for beside it.
        name: data set name of the rows.
        task: task of rows that name none.
        split: of own rows that have a field of this name, which are read; empty is all.
    """

    source: str
    input: str
    images: str
    name: str
    task: str
    split: str = "train"


@dataclass(frozen=True)
class SourceUnit:
    """A piece of work: what one task reads. Small and picklable.

    Attributes:
        source: the ingest's input.
        file: the file to read, or the folder of files.
        shard: short name of that file, for ids and messages.
        start: first byte, or first row, of the slice.
        stop: one past the last; 0 is the end of the file.
        first: number of the slice's first entry in the file.
        num_bytes: size of the file.
        modified_ns: when the file was changed last.
        details: whatever else the reader needs.
    """

    source: SourceInput
    file: storage.Location
    shard: str
    start: int = 0
    stop: int = 0
    first: int = 0
    num_bytes: int = 0
    modified_ns: int = 0
    details: Any = field(default=None, repr=False)

    @classmethod
    def of_file(cls, source: SourceInput, file: storage.FoundFile, details: Any = None) -> SourceUnit:
        """A whole file."""
        return cls(
            source,
            file.location,
            file.name,
            num_bytes=file.num_bytes,
            modified_ns=file.modified_ns,
            details=details,
        )

    def row_id(self, key: str) -> str:
        """Id of a row: the file without its ending, then the key within it."""
        return f"{self.shard.rsplit('.', 1)[0]}/{key}"


@dataclass(frozen=True)
class Rejected:
    """An input sample that gives no row.

    Attributes:
        key: of the sample within its shard; empty where a whole shard, or the rest of one, cannot be read.
        shard: file that holds it.
        reason: one short phrase; what cannot be printed in it is escaped.
        filter: name of the filter that removed it; empty is quarantine: something is wrong with the sample.
        missing: where its image was looked for, as pairs of ``Location``'s fields, where it is missing.
    """

    key: str
    shard: str
    reason: str
    filter: str = ""
    missing: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Make names from data harmless: they may be of any length and hold any bytes."""
        object.__setattr__(self, "key", shorten(self.key))
        object.__setattr__(self, "reason", shorten(self.reason, LONGEST_REASON))


ReadResult = SampleRow | Rejected
"""Results of reading, one per input sample."""

Changes = Counter[str]
"""Counts of samples that were kept, but changed: name of the change -> samples. See docs/data_format.md."""


class Reader(Protocol):
    """A family of file formats."""

    def plan(self, source: SourceInput) -> Iterator[SourceUnit]:
        """Cut the input into units, in a fixed order.

        Raises:
            SettingsError: the input is missing or of another kind; names the fix.
        """

    def read(self, unit: SourceUnit, changes: Changes | None = None) -> Iterator[ReadResult]:
        """Rows of a unit: images as their original bytes, width and height still 0.

        Args:
            unit: from ``plan``.
            changes: counts what was changed in the samples that are kept.
        """


@dataclass(frozen=True)
class Source:
    """A data set: how its files are read and what its samples are for.

    Attributes:
        task: key of ``tinygptv.data.prompts.INSTRUCTIONS``; empty where each row names its own.
        reader: family of its files.
        web: captions are from the open web, so the filters for captions apply.
    """

    task: str
    reader: Reader
    web: bool = False


class Malformed(ValueError):
    """A sample cannot be used; the text is the reason for the quarantine."""


class MissingImage(Malformed):
    """The image that a sample names is not there.

    Attributes:
        looked_for: where it could be.
    """

    def __init__(self, reason: str, looked_for: Sequence[storage.Location] = ()) -> None:
        super().__init__(reason)
        self.looked_for = tuple(looked_for)


class Filtered(ValueError):
    """A sample is sound, but not trained on."""

    def __init__(self, filter_name: str, reason: str) -> None:
        super().__init__(reason)
        self.filter = filter_name


def rejection(unit: SourceUnit, key: str, error: Exception) -> Rejected:
    """Set a sample apart for an error that reading it raised.

    Whatever is in a row, it costs that row alone. Only what is not the row's fault is raised again: no memory, a full
    disk, a disk or network that fails.
    """
    if isinstance(error, MemoryError | OSError | storage.DiskFullError):
        raise error
    if isinstance(error, MissingImage):
        return Rejected(key, unit.shard, str(error), missing=tuple((at.root, at.path) for at in error.looked_for))
    if isinstance(error, Malformed | Filtered):
        return Rejected(key, unit.shard, str(error), getattr(error, "filter", ""))
    if isinstance(error, KeyError):
        return Rejected(key, unit.shard, f"malformed entry: it has no {error}")
    return Rejected(key, unit.shard, f"malformed entry: {type(error).__name__} {error}")


def shorten(text: str, longest: int = LONGEST_NAME) -> str:
    """Text that can be written as UTF-8 on one line of bounded length, whatever it was made of."""
    text = " ".join(text.encode("utf-8", "backslashreplace").decode("utf-8").split())
    return text if len(text) <= longest else f"{text[: longest - 25]} .. ({len(text):,} characters)"


_PACKED = ".{gz,bz2,xz,zst}"
"""Endings of a file that somebody compressed; such files are read as they are."""


def find_input(source: SourceInput, *defaults: str) -> list[storage.FoundFile]:
    """Files of a source.

    Args:
        source: its input may be a file, a pattern, or a folder.
        defaults: official names, or patterns, of the files in such a folder; the first that matches counts.

    Raises:
        SettingsError: there are none.
    """
    if not source.input:
        raise SettingsError(
            f"source={source.source} needs input=: {defaults[0] if defaults else 'an annotation file'}, or its folder."
        )
    given = storage.Location.parse(source.input)
    names = [name for default in defaults for name in (default, f"{default}{_PACKED}")]
    patterns = [given / name for name in names] if names and storage.is_folder(given) else [given]
    for pattern in patterns:
        if files := storage.find_files(pattern, tells_missing=pattern == given):
            refuse_unusable(files)
            return files
    if patterns[0] != given and (files := _find_one_folder_down(source, given, names)):
        return files
    looked = ", ".join(str(given / default) for default in defaults) if patterns[0] != given else str(given)
    hint = unpack_hint(given) or "; check the path"
    raise SettingsError(f"input={source.input!r} matches no file (looked for {looked}){hint}.")


def _find_one_folder_down(
    source: SourceInput, folder: storage.Location, names: Sequence[str]
) -> list[storage.FoundFile]:
    """Official files in a folder below the one that was given, as ``annotations/``.

    Raises:
        SettingsError: several folders have them.
    """
    for name in names:
        files = storage.find_files(folder / "*" / name, tells_missing=False)
        folders = sorted({file.location.parent for file in files})
        if len(folders) > 1:
            where = " and ".join(str(found) for found in folders)
            raise SettingsError(f"input={source.input!r} holds {name} more than once, in {where}: name one of them.")
        if files:
            refuse_unusable(files)
            return files
    return []


def unpack_hint(folder: storage.Location | None) -> str:
    """The end of a sentence about a file that is not in a folder: an archive there that may hold it; or nothing."""
    if folder is None or not storage.is_folder(folder):
        return ""
    archives = [name for name in sorted(storage.list_names(folder)) if name.lower().endswith(_ARCHIVES)]
    return f"; {folder / archives[0]} may hold it: unpack it first" if archives else ""


_NOT_READ = (".zip", ".rar", ".7z")
_ARCHIVES = (*_NOT_READ, ".tar", ".tar.gz", ".tgz")
LFS_POINTER, _LARGEST_POINTER = b"version https://git-lfs", 1024


def refuse_unusable(files: list[storage.FoundFile]) -> None:
    """Refuse files that stand for others.

    Raises:
        SettingsError: one is an archive, or what a clone without Git LFS has in place of the file.
    """
    for file in files:
        if file.name.lower().endswith(_NOT_READ):
            raise SettingsError(f"{file.location} is an archive: unpack it, and give the unpacked file or folder.")
        if file.name.lower().endswith((".xlsx", ".xls", ".ods")):
            raise SettingsError(f"{file.location} is a spreadsheet: save it as CSV in UTF-8, and use source=csv.")
        if 0 < file.num_bytes < _LARGEST_POINTER and storage.read_bytes(file.location).startswith(LFS_POINTER):
            raise SettingsError(f"{file.location} is a Git LFS pointer, not the file: fetch it with `git lfs pull`.")
