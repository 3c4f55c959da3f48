"""Images that annotations name: where their folder is, under which names a file may be there, and reading it."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines import storage
from pipelines.data.sources.base import LFS_POINTER, Malformed, MissingImage, SourceInput, shorten
from pipelines.settings import SettingsError
from tinygptv.data.data_url import DataURL, DataURLError
from tinygptv.data.images import without_file_scheme
from tinygptv.lru import LRU

_KEPT_IMAGES = 32

_OF_ONE_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENXIO,
}
"""Errors that say something about one file; any other is about the disk or the network."""


@dataclass(frozen=True)
class ImageLayout:
    """Folders and names of a data set's images.

    Attributes:
        folders: image folders relative to the annotation file's folder and those above it, as publishers and read-mes
            name them; tried in order where no ``images=`` is given. ``.`` is the annotation file's own, where none is.
        alternatives: a name as the annotation gives it -> names under which the file may be in the image folder, the
            likeliest first.
        splits: names of folders that hold one split each. Where one is found, the image folder is the one above it.
    """

    folders: tuple[str, ...] = ()
    alternatives: Callable[[str], tuple[str, ...]] = field(default=lambda name: (name,))
    splits: frozenset[str] = frozenset()


_COCO_NUMBER = re.compile(
    r"(?:(?:.*/)?(?:COCO_(?:train|val|test)\d{4}_|(?=\d{12}\.)))?(\d{1,12})\.jpe?g", re.IGNORECASE
)
"""A short number in a folder is another data set's: Visual Genome's ``VG_100K/9.jpg`` is not COCO's image 9."""

_COCO_SPLITS = (
    ("train2014", "COCO_train2014_"),
    ("train2017", ""),
    ("val2014", "COCO_val2014_"),
    ("val2017", ""),
    ("test2015", "COCO_test2015_"),
)


def coco_names(name: str) -> tuple[str, ...]:
    """Names that a COCO image may have: with the prefix of 2014 or without, in a folder per split or not.

    COCO's numbers are unique over all its splits, and the images of 2014 and 2017 are the same. An image that is named
    as one of validation or test is looked for there alone: below ``images=coco`` such a list trains on both, below
    ``images=coco/train2014`` on what is in the training images' folder, as in the release.
    """
    match = _COCO_NUMBER.fullmatch(name)
    base = name.rsplit("/", 1)[-1]
    if match is None:
        return tuple(dict.fromkeys([base, name]))
    if held_out := re.match(r"COCO_((?:val|test)\d{4})_", base):
        return tuple(dict.fromkeys([base, name, f"{held_out[1]}/{base}"]))
    number = f"{int(match[1]):012d}.jpg"
    files = [f"{prefix}{number}" for _, prefix in _COCO_SPLITS]
    folders = [f"{folder}/{prefix}{number}" for folder, prefix in _COCO_SPLITS]
    return tuple(dict.fromkeys([base, *folders, *files, name]))


def below(*folders: str) -> Callable[[str], tuple[str, ...]]:
    """Alternatives for images that may be in one of several folders below the image folder."""
    return lambda name: tuple(dict.fromkeys([name, *(f"{folder}/{name}" for folder in folders)]))


_COCO_ROOTS = (
    *("", "coco/", "COCO/", "coco2014/", "coco2017/", "mscoco/", "coco/images/", "images/"),
    "images/mscoco/images/",  # in a clone of refer
)
_COCO_FOLDERS = tuple(f"{root}{folder}" for root in _COCO_ROOTS for folder in ("train2014", "train2017"))

COCO = ImageLayout(
    (*_COCO_FOLDERS, "coco/images", "coco_images", "coco"),
    coco_names,
    frozenset(folder for folder, _ in _COCO_SPLITS),
)


BESIDE = ImageLayout((".",))
"""Images are named relative to the annotation file."""


def find_image_folder(source: SourceInput, file: storage.Location, layout: ImageLayout) -> storage.Location:
    """The folder of a source's images: ``images=``, else the first of the layout's folders that is there.

    Args:
        source: the ingest's input.
        file: annotation file.
        layout: where images may be.

    Raises:
        SettingsError: none is given and none found, or what is given is no folder; lists where it looked.
    """
    if source.images:
        folder = storage.Location.parse(source.images)
        if not storage.is_folder(folder):
            raise SettingsError(
                f"images={source.images!r} is no folder; give the one that holds the images of {source.source}."
            )
        return folder
    looked = []
    above = file.parent
    for _ in range(3):
        for folder in [above / name for name in layout.folders if name != "."]:
            looked.append(folder)
            if storage.is_folder(folder):
                return folder.parent if folder.name in layout.splits else folder
        if above == above.parent:
            break
        above = above.parent
    if "." in layout.folders:
        return file.parent
    where = f"; looked for {', '.join(str(folder) for folder in looked[:6])} and the same in the folders above"
    raise SettingsError(
        f"source={source.source} needs images=: the folder that holds its images{where if looked else ''}."
    )


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

_NO_IMAGE: tuple[tuple[bytes, str], ...] = (
    (LFS_POINTER, "a Git LFS pointer: fetch it with `git lfs pull`"),
    (b"<!doctype html", "an HTML page: the download failed"),
    (b"<html", "an HTML page: the download failed"),
    (b"<?xml", "XML, e.g. an error of an object storage or an SVG drawing"),
    (b"<svg", "an SVG drawing, which is no image of pixels"),
)

_BRANDS = {
    **dict.fromkeys((b"ftypavif", b"ftypavis"), "an AVIF"),
    **dict.fromkeys((b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"), "a HEIC"),
    b"JXL \r\n\x87\n": "a JPEG XL",
    b"jP  \r\n\x87\n": "a JPEG 2000",
}
"""Bytes 4 to 11 of images in boxes, whose first four are the size of the first box."""


def check_image_name(name: str, data: bytes) -> None:
    """Refuse image bytes that are empty, or of another format than their name says.

    Raises:
        Malformed: they are.
    """
    name = shorten(name)
    if not data:
        raise Malformed(f"image {name} is empty (0 bytes)")
    kind = next((kind for kind, magic, _ in _MAGIC if data.startswith(magic)), None)
    if kind is None:
        head = data[:64].lstrip().lower()
        what = next((what for magic, what in _NO_IMAGE if head.startswith(magic)), None)
        if name_of_brand := _BRANDS.get(data[4:12]):
            what = f"{name_of_brand} image: convert it to JPEG or PNG"
        raise Malformed(f"image {name} is {what}" if what else f"image {name} does not hold an image in a known format")
    extension = name.rsplit(".", 1)[-1].lower()
    if extension in IMAGE_EXTENSIONS and not any(extension in names for label, _, names in _MAGIC if label == kind):
        raise Malformed(f"image {name} has a wrong extension: it holds a {kind}")


class ImageFolder:
    """Images that annotations name. Keeps the last few, because neighbouring entries often ask for the same one."""

    def __init__(
        self,
        folder: storage.Location | None,
        alternatives: Callable[[str], tuple[str, ...]] | None = None,
    ) -> None:
        """Open.

        Args:
            folder: that holds the images; None where there is none.
            alternatives: see ``ImageLayout``.
        """
        self.folder = folder
        self._alternatives = alternatives or (lambda name: (name,))
        self._likeliest = 0  # which alternative was found last
        self._kept: LRU[str, bytes] = LRU(_KEPT_IMAGES)

    def read(self, name: str) -> bytes:
        """Bytes of an image.

        Args:
            name: as the annotation gives it: a path below the folder, an absolute path into it, a ``data:`` URL, or
                base64.

        Raises:
            Malformed: the name leads out of the folder, or the file is missing, empty, or of another format.
            OSError: the disk or the network fails.
        """
        return self._kept.get_or_make(name, lambda: self._read(name))

    def _read(self, name: str) -> bytes:
        if not name.strip():
            raise Malformed("the image's name is empty")
        if url := data_url_of(name):
            return _decode_data_url(url)
        if "://" in name[:12] and not name.startswith("file://"):
            raise Malformed(f"image {shorten(name)} is a URL: download it, and name the file")
        if self.folder is None:
            raise Malformed(f"image {shorten(name)} is a path, and images= names no folder")
        relative = self._below_folder(name)
        names = tuple(dict.fromkeys(form for each in self._alternatives(relative) for form in unicode_forms(each)))
        order = [names[self._likeliest]] if self._likeliest < len(names) else []
        for candidate in dict.fromkeys([*order, *names]):
            data = _read_if_there(self.folder / candidate, name)
            if data is not None:
                self._likeliest = names.index(candidate)
                check_image_name(candidate, data)
                return data
        tried = f"; also looked for {names[1]} and {len(names) - 2} more names" if len(names) > 2 else ""
        looked_for = [self.folder / candidate for candidate in names]
        raise MissingImage(f"image {shorten(name)} is missing in {self.folder}{tried}", looked_for)

    def _below_folder(self, name: str) -> str:
        """The name relative to the image folder.

        Raises:
            Malformed: it leads elsewhere.
        """
        assert self.folder is not None
        path = image_path(name)
        inside = f"{self.folder.path.rstrip('/')}/"
        if self.folder.is_local and path.startswith(inside):
            path = path[len(inside) :]
        try:
            self.folder / path
        except ValueError:
            fix = ": give the folder that holds it as images=" if path.startswith("/") else ""
            raise Malformed(f"image {shorten(name)} is outside of the image folder {self.folder}{fix}") from None
        return path.removeprefix("./")


def unicode_forms(name: str) -> tuple[str, ...]:
    """A name, then as macOS writes it (an accent or a Korean letter apart) and as other systems do: they look alike."""
    return (name,) if name.isascii() else (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))


def image_path(name: str) -> str:
    """The path that a row means: of a ``file://`` URL, or as Windows writes it."""
    return without_file_scheme(name).replace("\\", "/")


_BASE64_IMAGE = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{100,}")
"""How JPEG, PNG, GIF and WebP begin in base64."""


def data_url_of(name: str) -> str:
    """The image that stands in place of a name, as a ``data:`` URL: tables have it in bare base64, too; empty for a
    path."""
    if name[:5].lower() == "data:":
        return name
    return f"data:image/jpeg;base64,{name}" if _BASE64_IMAGE.fullmatch(name) else ""


def _read_if_there(location: storage.Location, name: str) -> bytes | None:
    try:
        return storage.read_bytes(location)
    except FileNotFoundError:
        return None
    except UnicodeEncodeError as error:
        raise Malformed(
            f"image {shorten(name)} has a name with half a surrogate pair, which is no character"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        if error.errno is not None and error.errno in _OF_ONE_FILE:
            raise Malformed(f"image {shorten(name)} cannot be read: {os.strerror(error.errno)}") from error
        if location.is_local and error.errno is None:  # pyarrow says so of folders
            raise Malformed(f"image {shorten(name)} cannot be read: {shorten(str(error))}") from error
        raise


def _decode_data_url(url: str) -> bytes:
    """The image in a ``data:`` URL.

    Raises:
        Malformed: the URL is damaged, or holds no image.
    """
    try:
        data = DataURL.split(url).decode()
    except DataURLError as error:
        raise Malformed(f"the image's data: URL cannot be decoded: {error}") from error
    check_image_name("of a data: URL", data)
    return data
