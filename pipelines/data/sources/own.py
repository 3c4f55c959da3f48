"""One's own data: JSON lines, a Hugging Face data set, or a folder of Parquet files.

A row is an object (or table row) with words in one of these forms, and an image or none:

    {"image": "a.jpg", "turns": [{"question": "what is it?", "answers": ["a dog"]}], "task": "vqa"}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}]}
    {"image": "a.jpg", "question": "what is it?", "answer": "a dog"}
    {"image": "a.jpg", "caption": "a dog"}

Words are kept as they are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.data.sources.annotations import WRONG_ENTRY, Draft, make_row, plan_json, read_json
from pipelines.data.sources.base import (
    ENTRIES_PER_UNIT,
    ImageFolder,
    Malformed,
    ReadResult,
    Rejected,
    SourceInput,
    SourceUnit,
    check_image_name,
    find_input,
)
from pipelines.data.sources.entries import conversation_turns, text_of
from pipelines.settings import SettingsError
from tinygptv.data.sample import SampleRow, Turn

_BATCH_ROWS = 64


def own_draft(fields: Mapping[str, Any], default_task: str) -> Draft:
    """Read a row of own data.

    Args:
        fields: columns or JSON members.
        default_task: task where the row names none; empty decides by the form.

    Raises:
        Malformed: it has none of the forms above, or a field is of a wrong type.
    """
    if not isinstance(fields, Mapping):
        raise Malformed(f"the row is no object but {type(fields).__name__}")
    turns, form = _own_turns(fields)
    image = fields.get("image")
    if not isinstance(image, str | bytes | None):
        raise Malformed(f"image is no path but {type(image).__name__}")
    boxes = tuple(_own_box(box) for box in fields.get("boxes") or ())
    if not (task := fields.get("task") or default_task):
        task = form or ("text" if image is None else "conversation" if len(turns) > 1 else "instruct")
    return Draft(turns, image if isinstance(image, str) else None, boxes, str(task))


def _own_turns(fields: Mapping[str, Any]) -> tuple[tuple[Turn, ...], str]:
    """Turns, and the task that the form stands for."""
    if fields.get("turns") is not None:
        return tuple(Turn(text_of(turn, "question"), _answers(turn)) for turn in fields["turns"]), ""
    if fields.get("conversations") is not None:
        return conversation_turns(fields["conversations"]), ""
    if fields.get("question") is not None:
        return (Turn(text_of(fields, "question"), _answers(fields)),), ""
    if fields.get("caption") is not None:
        return (Turn("", (text_of(fields, "caption"),)),), "caption"
    raise Malformed(f"no turns, conversations, question or caption among {', '.join(map(str, fields)) or 'no fields'}")


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if fields.get("answers") is None:
        return (text_of(fields, "answer"),)
    answers = fields["answers"]
    if isinstance(answers, str) or not all(isinstance(answer, str) for answer in answers):
        raise Malformed("answers is not a list of texts")
    return tuple(answers)


def _own_box(box: Any) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(corner) for corner in box)
    return (x1, y1, x2, y2)


@dataclass(frozen=True)
class JsonLinesReader:
    """A .jsonl file of rows, or a .json file that holds a list of them."""

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per ``ENTRIES_PER_UNIT`` lines; blank lines are no rows."""
        for file in find_input(location, "*.jsonl"):
            folder = location.images or storage.parent(file.place)
            if file.place.endswith(".json"):
                yield from plan_json(location, file, "", {"folder": folder})
            else:
                yield from self._plan_lines(location, file, folder)

    def _plan_lines(self, location: SourceInput, file: storage.FoundFile, folder: str) -> Iterator[SourceUnit]:
        filesystem, path = storage.resolve(file.place)
        unit = SourceUnit(
            location, file.place, file.name, 0, 0, 0, file.num_bytes, file.modified_ns, {"folder": folder}
        )
        start = place = lines = 0
        with filesystem.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(storage.COPY_BYTES):
                end = -1
                while (end := chunk.find(b"\n", end + 1)) >= 0:
                    lines += 1
                    if lines % ENTRIES_PER_UNIT == 0:
                        yield replace(unit, start=start, stop=place + end + 1, first=lines - ENTRIES_PER_UNIT)
                        start = place + end + 1
                place += len(chunk)
        if place > start:
            yield replace(unit, start=start, stop=place, first=lines - lines % ENTRIES_PER_UNIT)

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """Rows of a slice; a broken line is set apart alone."""
        images = ImageFolder(unit.details["folder"])
        rows = read_json(unit) if "keyed" in unit.details or "damage" in unit.details else _read_lines(unit)
        for key, fields in rows:
            yield fields if isinstance(fields, Rejected) else _own_row(unit, key, fields, images)


def _read_lines(unit: SourceUnit) -> Iterator[tuple[str, Any]]:
    filesystem, path = storage.resolve(unit.place)
    with filesystem.open_input_file(path) as file:
        data = file.read_at(unit.stop - unit.start, unit.start)
    for number, line in enumerate(data.split(b"\n"), start=unit.first + 1):
        if not line.strip():
            continue
        key = f"line {number}"
        try:
            yield key, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield key, Rejected(key, unit.shard, f"the line is not UTF-8 text (byte {error.start})")
        except ValueError as error:
            yield key, Rejected(key, unit.shard, f"the line is no valid JSON: {error}")


def _own_row(unit: SourceUnit, key: str, fields: Any, images: ImageFolder) -> ReadResult:
    try:
        return make_row(unit, key, own_draft(fields, unit.location.task), images)
    except Malformed as error:
        return Rejected(key, unit.shard, str(error))
    except WRONG_ENTRY as error:
        return Rejected(key, unit.shard, f"malformed row: {type(error).__name__} {error}")


@dataclass(frozen=True)
class TableReader:
    """Parquet files, Arrow files, or a folder that ``datasets`` saved.

    The ``image`` column holds encoded bytes, a struct of ``bytes`` and ``path``, or paths below ``images=``.
    """

    def plan(self, location: SourceInput) -> Iterator[SourceUnit]:
        """One unit per Arrow file, or per ``ENTRIES_PER_UNIT`` rows and more of a Parquet file."""
        for file in self._files(location):
            unit = SourceUnit(location, file.place, file.name, 0, 0, 0, file.num_bytes, file.modified_ns, {})
            if not file.place.endswith(".parquet"):
                yield unit
                continue
            try:
                yield from _row_groups(unit)
            except _ARROW_ERRORS as error:
                yield replace(unit, details={"damage": f"no readable Parquet file: {_damage(error, unit)}"})

    def _files(self, location: SourceInput) -> list[storage.FoundFile]:
        folder = location.input
        if not folder or not storage.is_folder(folder):
            return find_input(location, "*.parquet")
        if storage.exists(storage.join(folder, "dataset_dict.json")):
            train = storage.join(folder, "train")
            if not storage.is_folder(train):
                raise SettingsError(
                    f"input={folder!r} has several splits and none is named train: name one, as input=.../SPLIT."
                )
            folder = train
        files = storage.find_files(storage.join(folder, "*.arrow")) or storage.find_files(
            storage.join(folder, "*.parquet")
        )
        if not files:
            raise SettingsError(f"input={folder!r} holds neither .arrow nor .parquet files.")
        return files

    def read(self, unit: SourceUnit) -> Iterator[ReadResult]:
        """Rows of a slice."""
        if "damage" in unit.details:
            yield Rejected("", unit.shard, unit.details["damage"])
            return
        images = ImageFolder(unit.location.images)
        number = unit.first
        try:
            for batch in _batches(unit):
                batch.validate(full=True)  # offsets that point out of a damaged file would crash the process
                for fields in batch.to_pylist():
                    yield self._row(unit, number, fields, images)
                    number += 1
        except _ARROW_ERRORS as error:
            reason = f"the table cannot be read after row {number}: {_damage(error, unit)}"
            yield Rejected("", unit.shard, reason)

    def _row(self, unit: SourceUnit, number: int, fields: dict[str, Any], images: ImageFolder) -> ReadResult:
        key = f"row {number}"
        cell = fields.get("image")
        name, image = (cell.get("path") or "", cell.get("bytes")) if isinstance(cell, dict) else ("", cell)
        if isinstance(image, bytes):
            try:
                check_image_name(name, image)
            except Malformed as error:
                return Rejected(key, unit.shard, str(error))
        else:
            image = image or name or None
        row = _own_row(unit, key, {**fields, "image": image}, images)
        return replace(row, image=image) if isinstance(image, bytes) and isinstance(row, SampleRow) else row


_ARROW_ERRORS = (pa.ArrowException, UnicodeDecodeError, OSError)


def _damage(error: Exception, unit: SourceUnit) -> str:
    """What is wrong with a table. Arrow raises ``OSError`` for damaged pages, too.

    Raises:
        OSError: it is the disk, or may be the network of a remote file: that must not cost rows.
    """
    if isinstance(error, OSError) and (error.errno is not None or not storage.is_local(unit.place)):
        raise error
    return str(error)


def _row_groups(unit: SourceUnit) -> Iterator[SourceUnit]:
    """Parts of a Parquet file of ``ENTRIES_PER_UNIT`` rows and more."""
    filesystem, path = storage.resolve(unit.place)
    with filesystem.open_input_file(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
    start = first = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows - first >= ENTRIES_PER_UNIT or group == metadata.num_row_groups - 1:
            yield replace(unit, start=start, stop=group + 1, first=first)
            start, first = group + 1, rows


def _batches(unit: SourceUnit) -> Iterator[pa.RecordBatch]:
    filesystem, path = storage.resolve(unit.place)
    with filesystem.open_input_file(path) as file:
        if unit.place.endswith(".parquet"):
            groups = list(range(unit.start, unit.stop))
            yield from pq.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS, row_groups=groups)
            return
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:  # the stream format, which `datasets` writes, has no closing index
            file.seek(0)
            yield from (batch.slice(i, _BATCH_ROWS) for batch in pa.ipc.open_stream(file) for i in _starts(batch))
            return
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            yield from (batch.slice(i, _BATCH_ROWS) for i in _starts(batch))


def _starts(batch: pa.RecordBatch) -> range:
    return range(0, batch.num_rows, _BATCH_ROWS)
