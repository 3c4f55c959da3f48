"""Finds the official files and images of a benchmark below the user's folder, in the layouts of their publishers.

A benchmark's own folder comes first, then the folder that the user gave, then any other folder but those of another
benchmark. A file counts only if its first entries have the fields that the benchmark reads, so that no benchmark takes
another's file of the same name.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.data.sources.base import LFS_POINTER
from pipelines.settings import SettingsError
from tinygptv.json_object import JsonObject

OWN_FOLDERS: dict[str, tuple[str, ...]] = {
    "vqav2": ("vqav2", "vqa2", "cocovqa"),
    "okvqa": ("okvqa",),
    "aokvqa": ("aokvqa", "aokvqav1p0"),
    "vizwiz": ("vizwiz", "vizwizvqa"),
    "gqa": ("gqa",),
    "vsr": ("vsr", "vsrzeroshot", "visualspatialreasoning"),
    "iconqa": ("iconqa", "iconvqa", "iconqadata"),
    "pope": ("pope",),
    "hateful_memes": ("hatefulmemes", "hatefulmeme", "hm"),
    "refcoco": ("refcoco",),
    "refcoco+": ("refcoco+", "refercoco+", "refcocop", "refcocoplus"),
    "refcocog": ("refcocog", "refercocog"),
}
"""Data set -> names of its folder as publishers, LAVIS and MiniGPT-v2 have it, in small letters without ``-_`` and
spaces."""

COCO_FOLDERS = (
    *("val2014", "train2014", "val2017", "train2017", "trainval2017", "test2015"),
    *("coco_images", "images", "coco", "mscoco"),
)
"""Folders of COCO's images as its zips unpack, as VSR's clone makes them, and as LAVIS and MiniGPT-v2 name them."""

_ANNOTATIONS = (".json", ".jsonl", ".p")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
_HEAD_BYTES = 1 << 16
_LEVELS_ABOVE = 3
_MOST_FOLDERS = 1000
_FOLDERS_TRIED = 200


@dataclass
class DataFolder:
    """The user's folder with everything below it; listed once.

    Attributes:
        root: ``data=``: a folder, or one annotation file.
        image_root: ``images=``; None looks below and beside ``root``.
        opened: what readers asked for, in order.
    """

    root: Path
    image_root: Path | None = None
    opened: list[BenchmarkFiles] = field(default_factory=list)

    def of(self, data_set: str) -> BenchmarkFiles:
        """The files of one data set.

        Args:
            data_set: key of ``OWN_FOLDERS``.
        """
        self.opened.append(BenchmarkFiles(self, data_set))
        return self.opened[-1]

    @property
    def folder(self) -> Path:
        """``root``, or the folder that holds it."""
        return self.root.parent if self.root.is_file() else self.root

    @cached_property
    def _listing(self) -> tuple[list[Path], list[Path]]:
        """Annotation files and archives, and folders below the root; hidden ones are left out."""
        return _list(self.folder)

    @property
    def files(self) -> list[Path]:
        """Annotation files and archives."""
        return self._listing[0]

    @cached_property
    def image_folders(self) -> list[Path]:
        """Folders in which images may lie, shallow ones first."""
        if self.image_root is not None:
            return [self.image_root, *_list(self.image_root)[1]]
        return [self.folder, *self._listing[1]]


def _list(root: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders below a folder. Links are followed, each real folder once; the many folders of single items
    (IconQA has one per question) are left out."""
    files: list[Path] = []
    folders: list[Path] = []
    waiting, seen = [root], {root.resolve()}
    while waiting:
        below = []
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    below.append(Path(entry.path))
                elif entry.name.endswith((*_ANNOTATIONS, *_ARCHIVES)):
                    files.append(Path(entry.path))
        if len(below) > _MOST_FOLDERS:
            continue
        for folder in below:
            real = folder.resolve()
            if not folder.name.startswith(".") and real not in seen and os.access(real, os.R_OK | os.X_OK):
                seen.add(real)
                waiting.append(folder)
                folders.append(folder)
    return sorted(files), sorted(folders, key=lambda path: (len(path.parts), str(path)))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c not in "-_ ")


@dataclass
class BenchmarkFiles:
    """The files of one data set; remembers which were used.

    Attributes:
        data: the user's folder.
        data_set: key of ``OWN_FOLDERS``.
        used: files that were found and taken.
        looked_in: image folders.
    """

    data: DataFolder
    data_set: str
    used: list[Path] = field(default_factory=list)
    looked_in: list[Path] = field(default_factory=list)

    def find(self, *names: str, fields: Sequence[str] = (), not_in: Sequence[str] = (), own: bool = False) -> Path:
        """The first of some files.

        Args:
            names: official file names, in order of preference; folders before them are allowed.
            fields: keys that its first entries must have.
            not_in: names of folders whose files are others, e.g. of another split.
            own: only files in the data set's own folder; for names that several data sets share.

        Raises:
            FileNotFoundError: none is there; the message names what was looked for, and what was found instead.
        """
        found = self.try_find(*names, fields=fields, not_in=not_in, own=own)
        if found is not None:
            return found
        wrong = [path for path in self._candidates(names, not_in, own) if _lacking(path, fields)]
        archives = [path for path in self.data.files if path.name.endswith(_ARCHIVES) and self._is_near(path)]
        hint = ""
        if wrong:
            lacking = f"another's: its entries have no {_lacking(wrong[0], fields)!r}"
            hint = f"; {wrong[0]} is {_fault(wrong[0]) or lacking}"
        elif archives:
            likely = next((path for path in archives if path.name.startswith(tuple(names))), archives[0])
            hint = f"; {likely} may hold it: unpack it first"
        raise FileNotFoundError(
            f"the benchmark needs {self.data_set}'s {' or '.join(names)} below data={self.data.root}; "
            f"there is none{hint}."
        )

    def try_find(
        self, *names: str, fields: Sequence[str] = (), not_in: Sequence[str] = (), own: bool = False
    ) -> Path | None:
        """The same, or None."""
        candidates = self._candidates(names, not_in, own)
        found = next((path for path in candidates if not _lacking(path, fields)), None)
        if found is not None and found not in self.used:
            self.used.append(found)
        return found

    def images(self, *folders: str) -> Images:
        """The images of this data set.

        Args:
            folders: official names of their folders, likeliest first, e.g. ``val2014`` or ``val/choose_txt``.
        """
        self.looked_in = self._image_folders(folders)
        return Images(self.looked_in)

    # ------------------------------------------------------------------ where to look

    def _candidates(self, names: Sequence[str], not_in: Sequence[str], own: bool) -> list[Path]:
        """Files of these names, the likeliest first."""
        if self.data.root.is_file() and any(_ends_with(self.data.root, name) for name in names):
            return [self.data.root]
        found = []
        for preference, name in enumerate(names):
            for path in self.data.files:
                if _ends_with(path, name) and path.parent.name not in not_in:
                    distance = self._distance(path)
                    if distance is not None and (distance == 0 or not own):
                        found.append((distance, preference, len(path.parts), str(path), path))
        return [path for *_, path in sorted(found)]

    def _distance(self, path: Path) -> int | None:
        """0 in the data set's own folder, 1 directly in the user's, 2 elsewhere, None in another data set's folder."""
        inside = [_plain(name) for name in (self.data.folder.name, *path.relative_to(self.data.folder).parts[:-1])]
        owners = [name for name in inside if any(name in own for own in OWN_FOLDERS.values())]
        own = OWN_FOLDERS.get(self.data_set, ())
        if owners and owners[-1] in own:
            return 0
        if owners and owners[-1] not in own:
            return None if len(owners) > 1 or inside[0] != owners[0] else 2
        return 1 if len(inside) == 1 else 2

    def _is_near(self, path: Path) -> bool:
        return self._distance(path) in (0, 1)

    def _image_folders(self, wanted: Sequence[str]) -> list[Path]:
        """Folders to look for images in, the likeliest first."""
        below = self.data.image_folders
        order = [folder for name in wanted for folder in below if _ends_with(folder, name)]
        if self.data.image_root is not None:
            return list(dict.fromkeys([*order, *below[:1], *_alike(below), *below[:_FOLDERS_TRIED]]))
        beside = [
            above / prefix / name
            for above in list(self.data.folder.parents)[:_LEVELS_ABOVE]
            for prefix in ("", "coco", "images")
            for name in wanted
        ]
        around = [path.parent for path in self.used]
        around += [parent for path in self.used for parent in path.parent.parents if self.data.folder in parent.parents]
        found = [*order, *around, self.data.folder, *_alike(below), *(path for path in beside if path.is_dir())]
        return list(dict.fromkeys(found))


def _ends_with(path: Path, name: str) -> bool:
    """Whether the last parts of a path are these, in small or capital letters."""
    return f"/{path.as_posix()}".lower().endswith(f"/{name.lower()}")


def _alike(folders: Sequence[Path]) -> list[Path]:
    """Folders whose name says that they hold images."""
    return [path for path in folders if _plain(path.name).endswith(("images", "image", "img", "imgs", "pictures"))]


def _lacking(path: Path, fields: Sequence[str]) -> str:
    """The first of the fields that a file's first entries do not have; empty where they have all."""
    if not fields or path.suffix == ".p":
        return ""
    head = _head(path)
    return next((name for name in fields if json.dumps(name).encode() not in head), "")


def _fault(path: Path) -> str:
    """What a file is that is no JSON at all; empty where it may be."""
    head = _head(path)
    if head.startswith(LFS_POINTER):
        return "a Git LFS pointer: fetch the file with `git lfs pull`"
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return ""
    return "no JSON but begins with " + repr(head[:20].decode("latin-1")) if head else "empty: download it again"


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD_BYTES)


class Images:
    """Finds images by name in a list of folders."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Choose where to look.

        Args:
            folders: in order of preference; must not be empty.
        """
        self.folders = list(folders)
        self._order = list(folders)

    def find(self, *names: str) -> Path:
        """Path of the first name that exists; where none does, the path that the first one should have."""
        for name in names:
            for position, folder in enumerate(self._order):
                path = folder / name
                if path.is_file():
                    self._order.insert(0, self._order.pop(position))  # the next one is likely there too
                    return path
        return self.folders[0] / names[0]

    def coco(self, image: int | str, split: str = "val2014") -> Path:
        """Path of a COCO image: the images of 2014 and 2017 are the same under other names, and numbers are unique.

        Args:
            image: its number, or a file name that ends in it.
            split: the likeliest of ``val2014`` and ``train2014``; ``2017`` for names without the split.
        """
        number = f"{int(Path(str(image)).stem.rsplit('_', 1)[-1]):012d}.jpg"
        names = {"2017": number, **{each: f"COCO_{each}_{number}" for each in ("val2014", "train2014")}}
        return self.find(names.pop(split), *names.values())


# ---------------------------------------------------------------------- reading


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        SettingsError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SettingsError(f"{path} is no valid JSON: {error}.") from error


def read_lines(path: Path) -> Iterator[JsonObject]:
    """The objects of a JSON Lines file, or of the list that somebody made of it.

    Raises:
        SettingsError: a line is no JSON; the message names it.
    """
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                yield from read_json(path)
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise SettingsError(f"{path}, line {number}, is no valid JSON: {error}.") from error


def text_of(value: object) -> str:
    """A field that must be text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:80]!r} is no text but {type(value).__name__}")
    return value


def texts_of(value: object) -> tuple[str, ...]:
    """A field that must be a list of texts.

    Raises:
        TypeError: it is something else; a text would pass for a list of its letters.
    """
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:80]!r} is no list of texts but {type(value).__name__}")
    return tuple(text_of(text) for text in value)


def label_of(value: Any) -> int:
    """A field that must be 0 or 1, as a number or a text.

    Raises:
        ValueError: it is something else.
    """
    if str(value).lower() not in ("0", "1", "false", "true", "0.0", "1.0"):
        raise ValueError(f"{str(value)[:80]!r} is neither 0 nor 1")
    return int(str(value).lower() in ("1", "true", "1.0"))


def choice_of(choices: Sequence[str], index: Any) -> str:
    """The choice at a place, counted from 0; a negative one, as test sets have it for "unknown", is none.

    Raises:
        ValueError: there is none.
    """
    place = int(index)
    if not 0 <= place < len(choices):
        raise ValueError(f"{place} is no place among {len(choices)} choices")
    return choices[place]


def answers_of(answers: object) -> list[str]:
    """Annotators' answers: a list of texts, or of ``{"answer": ..}``.

    Raises:
        ValueError: there are none, as in a test set.
        TypeError: it is no list, or one is no text.
    """
    if answers == []:
        raise ValueError("a question has no answers: is it a test set?")
    if not isinstance(answers, list):
        raise TypeError(f"{str(answers)[:80]!r} is no list of answers but {type(answers).__name__}")
    return [text_of(answer["answer"] if isinstance(answer, dict) else answer) for answer in answers]
