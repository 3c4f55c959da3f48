"""Published data sets by name, and what a stage of a recipe needs of them. The data is in datasets.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NotRequired, TypedDict

from pipelines.settings import SettingsError
from tinygptv.convert.sources import SourceFile
from tinygptv.training.stages import RECIPES, Stage

DATA_GROUPS = ("data", "data1", "data2", "data3", "data4")
"""Names of all sets of the paper's recipe, and of those of one stage."""
LINKS_PER_HOUR = 5_000_000
"""What img2dataset's read-me measures on one machine: 100 million links in 20 hours with 16 cores and 1 Gbit/s."""
BYTES_PER_HOUR = 12.5e6 * 3600
"""A line of 100 Mbit/s."""


@dataclass(frozen=True)
class ByHand:
    """A file or folder that a program cannot download.

    Attributes:
        address: where a person gets it.
        path: below the folder of raw data, where it must be afterwards.
    """

    address: str
    path: str


@dataclass(frozen=True)
class LinkList:
    """A list of links to images with captions.

    Attributes:
        file: JSON list of ``{"caption", "url"}``, below the raw folder.
        output: folder of the tars that img2dataset makes of it, below the raw folder.
    """

    file: str
    output: str


@dataclass(frozen=True)
class ImageRule:
    """Where single images of a set are.

    Attributes:
        match: regular expression with one group, searched in the name that the annotation gives.
        path: below the folder of raw data, with what the group found in place of ``{}``.
        urls: addresses, tried in order, with the same.
        fields: fields of the annotation that hold the address instead, tried in order.
        id: field of the annotation that is in the name; empty: the entry's key.
    """

    match: str
    path: str
    urls: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    id: str = ""


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: by which it is fetched.
        title: for people.
        sources: names of ``pipelines.data.sources`` that read it.
        input: what they read, below the folder of raw data.
        files: to download.
        archives: local paths of files that are unpacked where they are.
        by_hand: what a person has to fetch.
        needs: names of sets whose images it uses.
        links: images that img2dataset downloads; None for other sets.
        images: where its single images are; empty where there are none.
        of_images: local paths of archives that hold nothing but images.
        cut: local path of an archive -> paths of the annotations in it, of which a sample keeps the first.
        per_entry: rows of an entry of its annotations, about.
        gigabytes: on disk, rounded; 0 where it is not stated.
        rows: samples, rounded; 0 where it is not stated.
        license: of the annotations.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    input: str
    files: tuple[SourceFile, ...]
    archives: frozenset[str]
    by_hand: tuple[ByHand, ...]
    needs: tuple[str, ...]
    links: LinkList | None
    images: tuple[ImageRule, ...]
    of_images: frozenset[str]
    cut: Mapping[str, tuple[str, ...]]
    per_entry: int
    gigabytes: float
    rows: int
    license: str

    @property
    def hours(self) -> float:
        """To download, with 100 Mbit/s; lists of links on one machine with 1 Gbit/s."""
        return self.rows / LINKS_PER_HOUR if self.links else self.gigabytes * 1e9 / BYTES_PER_HOUR


class _FileTable(TypedDict):
    """A file in datasets.toml."""

    url: str
    name: str
    unpack: NotRequired[bool]
    of_images: NotRequired[bool]
    cut: NotRequired[list[str]]


class _ByHandTable(TypedDict):
    """What a person has to fetch, in datasets.toml."""

    address: str
    path: str


class _ListTable(TypedDict):
    """A list of links in datasets.toml."""

    file: str
    output: str


class _ImageTable(TypedDict):
    """Where single images are, in datasets.toml."""

    match: str
    path: str
    urls: NotRequired[list[str]]
    fields: NotRequired[list[str]]
    id: NotRequired[str]


class _SetTable(TypedDict):
    """A set in datasets.toml; its fields are described there."""

    title: str
    sources: list[str]
    folder: str
    input: NotRequired[str]
    files: NotRequired[list[_FileTable]]
    list: NotRequired[_ListTable]
    by_hand: NotRequired[list[_ByHandTable]]
    needs: NotRequired[list[str]]
    images: NotRequired[list[_ImageTable]]
    per_entry: NotRequired[int]
    gigabytes: float
    rows: int
    license: str


@cache
def all_sets() -> dict[str, DataSet]:
    """Every published data set, by name."""
    tables = tomllib.loads(files("pipelines.fetch").joinpath("datasets.toml").read_text("utf-8"))
    return {name: _data_set(name, table) for name, table in tables.items()}


def set_of(source: str) -> DataSet:
    """The set that a source of ``pipelines.data.sources`` reads.

    Raises:
        SettingsError: none is published under a name here.
    """
    for each in all_sets().values():
        if source in each.sources:
            return each
    raise SettingsError(f"source {source!r} belongs to no published data set of docs/datasets.md.")


def sets_of_stages(stages: Iterable[Stage]) -> list[DataSet]:
    """Data sets of the stages, with the sets whose images they use, each once."""
    sets = [set_of(source.name) for stage in stages for source in stage.sources]
    return with_needs(sets)


def with_needs(sets: Iterable[DataSet]) -> list[DataSet]:
    """Sets after those whose images they use, each once."""
    ordered: dict[str, DataSet] = {}
    for each in sets:
        for name in (*each.needs, each.name):
            ordered.setdefault(name, all_sets()[name])
    return list(ordered.values())


def find_sets(name: str) -> list[DataSet]:
    """The sets that a name means: a set, ``data`` (all of the paper's stages), or ``data1`` .. ``data4`` (of a stage).

    Returns:
        The sets with those that they need; empty where the name means none.
    """
    if name in all_sets():
        return with_needs([all_sets()[name]])
    stages = [stage for stage in RECIPES["paper"] if name in ("data", f"data{stage.number}")]
    return sets_of_stages(stages)


def _data_set(name: str, table: _SetTable) -> DataSet:
    folder = table["folder"]
    entries = table.get("files", [])
    listed = table.get("list")
    return DataSet(
        name=name,
        title=table["title"],
        sources=tuple(table["sources"]),
        input=table.get("input", folder),
        files=tuple(_file(folder, entry, table["license"]) for entry in entries),
        archives=frozenset(f"{folder}/{entry['name']}" for entry in entries if entry.get("unpack")),
        by_hand=tuple(ByHand(entry["address"], entry["path"]) for entry in table.get("by_hand", [])),
        needs=tuple(table.get("needs", [])),
        links=LinkList(f"{folder}/{listed['file']}", f"{folder}/{listed['output']}") if listed else None,
        images=tuple(_image_rule(folder, entry) for entry in table.get("images", [])),
        of_images=frozenset(f"{folder}/{entry['name']}" for entry in entries if entry.get("of_images")),
        cut={f"{folder}/{e['name']}": tuple(f"{folder}/{name}" for name in e["cut"]) for e in entries if "cut" in e},
        per_entry=table.get("per_entry", 1),
        gigabytes=table["gigabytes"],
        rows=table["rows"],
        license=table["license"],
    )


def _image_rule(folder: str, entry: _ImageTable) -> ImageRule:
    urls, fields = tuple(entry.get("urls", ())), tuple(entry.get("fields", ()))
    return ImageRule(entry["match"], f"{folder}/{entry['path']}", urls, fields, entry.get("id", ""))


def _file(folder: str, entry: _FileTable, license_: str) -> SourceFile:
    base, _, name = entry["url"].rpartition("/")
    return SourceFile(path=f"{folder}/{entry['name']}", name=name, base=f"{base}/", license=license_)
