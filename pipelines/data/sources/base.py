"""What every source is made of: units of work, the rows they give, and the ways in which a sample can be set apart.

A reader has two halves. ``plan`` looks at the input and cuts it into units: one per tar, or one per slice of an
annotation file. It runs once, in the driver, and reads no image. ``read`` turns one unit into rows; it runs wherever
there is a free CPU. Which units there are depends on the input alone, so the result never depends on how many workers
share them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines import storage
from pipelines.settings import SettingsError
from tinygptv.data.sample import SampleRow

ENTRIES_PER_UNIT = 1000
"""Annotation entries of one unit; small enough to share out, large enough that starting a task does not matter."""

_KEPT_IMAGES = 32


@dataclass(frozen=True)
class SourceInput:
    """Where a source's files lie, and what own data is called.

    Attributes:
        source: key of ``SOURCES``.
        input: tar glob, annotation file or folder.
        images: image folder; empty where the input holds the images or leads to them.
        name: data set name of the rows.
        task: task of rows that name none.
    """

    source: str
    input: str
    images: str
    name: str
    task: str


@dataclass(frozen=True)
class SourceUnit:
    """A piece of work: what one task reads. Small and picklable.

    Attributes:
        location: of the source.
        place: file to read.
        shard: short name of that file, for messages.
        start: first byte, or first row, of the slice.
        stop: one past the last; 0 is the end of the file.
        first: number of the slice's first entry in the file.
        num_bytes: size of the file.
        modified_ns: when the file was changed last.
        details: whatever else the reader needs.
    """

    location: SourceInput
    place: str
    shard: str
    start: int = 0
    stop: int = 0
    first: int = 0
    num_bytes: int = 0
    modified_ns: int = 0
    details: Any = field(default=None, repr=False)

    def row_id(self, key: str) -> str:
        """Id of a row: the file without its ending, then the key within it."""
        return f"{self.shard.rsplit('.', 1)[0]}/{key}"


@dataclass(frozen=True)
class Rejected:
    """An input sample that gives no row.

    Attributes:
        key: of the sample within its shard; empty where a whole shard, or the rest of one, cannot be read.
        shard: file that holds it.
        reason: one clear phrase.
        filter: name of the filter that left it out; empty is quarantine: something is wrong with the sample.
    """

    key: str
    shard: str
    reason: str
    filter: str = ""


ReadResult = SampleRow | Rejected
"""What reading yields, once per input sample."""


class Reader(Protocol):
    """A family of file formats."""

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """Cut the input into units, in a fixed order.

        Raises:
            SettingsError: the input is missing or of another kind; names the mend.
        """

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """Rows of a unit: images as their original bytes, width and height still 0."""


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
    """An entry is not as its format says; the text is the reason for the quarantine."""


class Filtered(ValueError):
    """An entry is sound, but the data set does not train on it (``filter`` says why)."""

    def __init__(self, filter_name: str, reason: str) -> None:
        super().__init__(reason)
        self.filter = filter_name


def find_input(location: SourceInput, default: str = "") -> list[storage.FoundFile]:
    """Files of a source.

    Args:
        location: of the source; its input may be a file, a pattern, or a folder that holds ``default``.
        default: official name, or pattern, of the files in such a folder.

    Raises:
        SettingsError: there are none.
    """
    if not location.input:
        raise SettingsError(f"source={location.source} needs input=: {default or 'an annotation file'}, or its folder.")
    pattern = location.input
    if default and storage.is_folder(pattern):
        pattern = storage.join(pattern, default)
    files = storage.find_files(pattern)
    if not files:
        raise SettingsError(
            f"input={location.input!r} matches no file ({pattern!r}); check the path of {location.source}."
        )
    return files


def image_folder(location: SourceInput, default: str = "") -> str:
    """The folder of a source's images.

    Raises:
        SettingsError: none is given, or it is missing.
    """
    folder = location.images or default
    if not folder:
        raise SettingsError(f"source={location.source} needs images=: the folder that holds its images.")
    if not storage.is_folder(folder):
        raise SettingsError(f"images={folder!r} is no folder; give the one that holds the images of {location.source}.")
    return folder


_MAGIC: tuple[tuple[str, bytes, frozenset[str]], ...] = (
    ("JPEG", b"\xff\xd8\xff", frozenset({"jpg", "jpeg", "jpe", "jfif", "mpo"})),
    ("PNG", b"\x89PNG\r\n\x1a\n", frozenset({"png", "apng"})),
    ("GIF", b"GIF8", frozenset({"gif"})),
    ("BMP", b"BM", frozenset({"bmp"})),
    ("TIFF", b"II*\x00", frozenset({"tif", "tiff"})),
    ("TIFF", b"MM\x00*", frozenset({"tif", "tiff"})),
    ("WEBP", b"RIFF", frozenset({"webp"})),
)
IMAGE_EXTENSIONS = frozenset().union(*(names for _, _, names in _MAGIC))


def check_image_name(name: str, data: bytes) -> None:
    """Refuse image bytes that are empty or of another format than their name says.

    Raises:
        Malformed: they are.
    """
    if not data:
        raise Malformed(f"image {name} is empty (0 bytes)")
    extension = name.rsplit(".", 1)[-1].lower()
    if extension not in IMAGE_EXTENSIONS:
        return  # the name says nothing
    kind = next((kind for kind, magic, _ in _MAGIC if data.startswith(magic)), None)
    if kind is None:
        raise Malformed(f"image {name} does not hold an image in a known format")
    if not any(extension in names for label, _, names in _MAGIC if label == kind):
        raise Malformed(f"image {name} has a wrong extension: it holds a {kind}")


class ImageFolder:
    """Images that annotations name. Keeps the last few, because neighbouring entries often ask for the same one."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._kept: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """Bytes of an image.

        Args:
            name: path below the folder, as the annotation says.

        Raises:
            Malformed: the path climbs out of the folder, or the file is missing, empty, or of another format.
        """
        if name not in self._kept:
            data = self._read(name)
            while len(self._kept) >= _KEPT_IMAGES:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = data
        return self._kept[name]

    def _read(self, name: str) -> bytes:
        if not self.folder:
            raise Malformed(f"image {name} is a path, and images= names no folder")
        place = storage.safe_path(self.folder, name)
        if place is None:
            raise Malformed(f"image path {name!r} climbs out of the image folder")
        try:
            data = storage.read_bytes(place)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise Malformed(f"image {name} is missing") from error
        except (OSError, ValueError) as error:
            raise Malformed(f"image {name} cannot be read: {error}") from error
        check_image_name(name, data)
        return data
