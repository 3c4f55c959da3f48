"""Published weight files by name: where each is, how large, its hash and licence. The data is in weights.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NotRequired, TypedDict, cast

Kind = Literal["model", "space", "dataset", ""]


@dataclass(frozen=True)
class SourceFile:
    """One published file.

    Attributes:
        path: local name below the folder that it is fetched to, e.g. ``phi-2/config.json``.
        name: at the publisher's, below ``base`` or in ``repo``.
        num_bytes: 0 where nobody states it.
        sha256: in hexadecimal; empty where nobody states it.
        stated_by: who states the two.
        base: address that the name is added to; empty for a file of the hub.
        repo: repository on the Hugging Face hub; empty for another address.
        kind: of the repository.
        revision: full commit hash of the repository.
        license: as the publisher states it.
    """

    path: str
    name: str
    num_bytes: int = 0
    sha256: str = ""
    stated_by: str = ""
    base: str = ""
    repo: str = ""
    kind: Kind = ""
    revision: str = ""
    license: str = ""


@dataclass(frozen=True)
class Part:
    """A published part of the model: one file, or the files of a folder.

    Attributes:
        name: by which it is fetched.
        title: for people.
        role: argument of ``tinygptv.convert.load_release``.
        publisher: who publishes it.
        path: local file or folder below the folder that it is fetched to.
        files: of the part.
    """

    name: str
    title: str
    role: str
    publisher: str
    path: str
    files: tuple[SourceFile, ...]

    @property
    def num_bytes(self) -> int:
        """Of the files whose size is stated."""
        return sum(file.num_bytes for file in self.files)


class _FileTable(TypedDict):
    """Fields of a file in weights.toml."""

    name: str
    bytes: int
    sha256: str


class _PartTable(TypedDict):
    """Fields of a part in weights.toml."""

    title: str
    role: str
    publisher: str
    license: str
    stated_by: str
    files: list[_FileTable]
    base: NotRequired[str]
    repo: NotRequired[str]
    kind: NotRequired[Kind]
    revision: NotRequired[str]
    folder: NotRequired[str]


class _Tables(TypedDict):
    """weights.toml."""

    groups: dict[str, list[str]]
    parts: dict[str, _PartTable]


@cache
def _tables() -> _Tables:
    return cast(_Tables, tomllib.loads(files(__name__).joinpath("weights.toml").read_text("utf-8")))


@cache
def all_parts() -> dict[str, Part]:
    """Every published part, by name."""
    return {name: _part(name, table) for name, table in _tables()["parts"].items()}


def groups() -> dict[str, tuple[str, ...]]:
    """Groups of parts that belong together: ``released`` answers questions, ``start`` begins the paper's stage 1."""
    return {name: tuple(parts) for name, parts in _tables()["groups"].items()}


def find_parts(name: str) -> tuple[Part, ...]:
    """The parts that a group or a part's name means.

    Raises:
        ValueError: there is neither.
    """
    parts = all_parts()
    if name in parts:
        return (parts[name],)
    if name not in groups():
        raise ValueError(f"{name!r} names no weights; there are: {', '.join([*groups(), *parts])}.")
    return tuple(parts[part] for part in groups()[name])


def _part(name: str, table: _PartTable) -> Part:
    folder = table.get("folder", "")
    of_all: Any = {key: value for key, value in table.items() if key in SourceFile.__annotations__}
    entries = tuple(
        SourceFile(
            path=f"{folder}/{file['name']}" if folder else file["name"],
            name=file["name"],
            num_bytes=file["bytes"],
            sha256=file["sha256"],
            **of_all,
        )
        for file in table["files"]
    )
    return Part(name, table["title"], table["role"], table["publisher"], folder or entries[0].path, entries)
