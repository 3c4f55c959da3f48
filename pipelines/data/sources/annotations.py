"""Data sets of one JSON file and an image folder: captions, questions, conversations, grounded phrases, text.

A file is cut into slices of entries; ``pipelines.data.sources.entries`` says what an entry of each data set means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines import storage
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    Filtered,
    ImageFolder,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    find_input,
    image_folder,
)
from pipelines.data.sources.json_items import Item, JsonDamage, iterate_items, split_items
from pipelines.settings import SettingsError
from tinygptv.data.sample import SampleRow, Turn

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Draft:
    """A sample before its image is read.

    Attributes:
        turns: questions and answers, cleaned.
        image: path below the image folder; None for text only.
        boxes: x1, y1, x2, y2 in pixels of the original image.
        task: overrides the source's.
    """

    turns: tuple[Turn, ...]
    image: str | None = None
    boxes: tuple[Box, ...] = ()
    task: str = ""


Describe = Callable[[Any, str], Iterator[Draft]]
"""An entry and its key (its number in a list) -> samples. Raises ``Filtered``, ``Malformed`` or a ``WRONG_ENTRY``."""

WRONG_ENTRY = (KeyError, TypeError, IndexError, AttributeError, ValueError)


@dataclass(frozen=True)
class AnnotationReader:
    """A family of JSON files.

    Attributes:
        describe: what an entry says.
        file: official name of the file, looked for where the input is a folder; ``{a,b}`` for several.
        member: list that holds the entries where the top level is an object; empty takes the object's own members.
        images: image folder below the annotation file's, where the data set is distributed with one.
        has_images: False for text only.
    """

    describe: Describe
    file: str
    member: str = ""
    images: str = ""
    has_images: bool = True

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` entries of each file."""
        for file in find_input(location, self.file):
            folder = ""
            if self.has_images:
                beside = storage.join(storage.parent(file.place), self.images) if self.images else ""
                folder = image_folder(location, beside)
            yield from plan_json(location, file, self.member, details={"folder": folder})

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """Samples of one slice."""
        images = ImageFolder(unit.details["folder"]) if unit.details.get("folder") else None
        for key, entry in read_json(unit):
            if isinstance(entry, Rejected):
                yield entry
            else:
                yield from read_drafts(unit, key, partial(self.describe, entry, key), images)


def plan_json(
    location: SourceInput,
    file: storage.FoundFile,
    member: str,
    details: dict[str, Any],
    *,
    about: Callable[[list[Item]], dict[str, Any]] | None = None,
    entries_per_unit: int = ENTRIES_PER_UNIT,
) -> Iterator[SourceUnit]:
    """Slices of a JSON file.

    Args:
        location: of the source.
        file: the file.
        member: see ``iterate_items``.
        details: what the reader needs besides; ``keyed`` is added.
        about: more details, made from the entries of a slice.
        entries_per_unit: most entries of a slice.

    Raises:
        SettingsError: the file holds no entries.
    """
    filesystem, path = storage.resolve(file.place)
    first, damage = 0, ""
    waiting: list[Item] = []

    def unit(**more: Any) -> SourceUnit:
        start, stop = waiting[0].start, waiting[-1].stop
        known = {**details, "keyed": waiting[0].key is not None, **more}
        return SourceUnit(location, file.place, file.name, start, stop, first, file.num_bytes, file.modified_ns, known)

    with filesystem.open_input_stream(path, compression=None) as stream:
        items = iterate_items(stream, member)
        while True:
            try:
                item = next(items, None)
            except JsonDamage as error:
                item, damage = None, str(error)
            if waiting and (item is None or len(waiting) == entries_per_unit):
                yield unit(**(about(waiting) if about else {}))
                first += len(waiting)
                waiting = []
            if item is None:
                break
            waiting.append(item)
    if first == 0:
        where = f" in {member!r}" if member else ""
        raise SettingsError(f"{file.place} holds no entries{where}: {damage or 'is it the right file?'}")
    if damage:
        yield SourceUnit(location, file.place, file.name, details={"damage": damage})


def read_json(unit: SourceUnit) -> Iterator[tuple[str, Any]]:
    """Keys and entries of a slice; a ``Rejected`` in place of what cannot be read."""
    if "damage" in unit.details:
        yield "", Rejected("", unit.shard, unit.details["damage"])
        return
    filesystem, path = storage.resolve(unit.place)
    with filesystem.open_input_file(path) as file:
        data = file.read_at(unit.stop - unit.start, unit.start)
    items = split_items(data, unit.start, keyed=unit.details["keyed"])
    for number, item in enumerate(items, start=unit.first):
        key = item.key if item.key is not None else str(number)
        try:
            yield key, json.loads(data[item.value_start - unit.start : item.stop - unit.start].decode("utf-8"))
        except UnicodeDecodeError as error:
            yield key, Rejected(key, unit.shard, f"the entry is not UTF-8 text (byte {item.value_start + error.start})")
        except ValueError as error:
            yield key, Rejected(key, unit.shard, f"the entry is no valid JSON: {error}")


def read_drafts(
    unit: SourceUnit, key: str, drafts: Callable[[], Iterator[Draft]], images: ImageFolder | None
) -> Iterator[ReadResult]:
    """Turn the drafts of one entry into rows.

    Args:
        unit: that holds the entry.
        key: of the entry; a number is added where an entry gives several samples.
        drafts: makes them.
        images: where they are read from; None for text only.
    """
    number = 0
    try:
        for number, draft in enumerate(drafts()):
            row_key = f"{key}/{number}" if number else key
            try:
                yield make_row(unit, row_key, draft, images)
            except (Filtered, Malformed) as error:
                yield Rejected(row_key, unit.shard, str(error), getattr(error, "filter", ""))
    except (Filtered, Malformed) as error:
        yield Rejected(key, unit.shard, str(error), getattr(error, "filter", ""))
    except WRONG_ENTRY as error:
        yield Rejected(key, unit.shard, f"malformed entry: {type(error).__name__} {error}")


def make_row(unit: SourceUnit, key: str, draft: Draft, images: ImageFolder | None) -> SampleRow:
    """A draft with its image.

    Raises:
        Malformed: the image cannot be used.
    """
    image = images.read(draft.image) if images and draft.image is not None else None
    location = unit.location
    return SampleRow(
        id=unit.row_id(key),
        source=location.name,
        task=draft.task or location.task,
        turns=draft.turns,
        image=image,
        boxes=draft.boxes,
    )
