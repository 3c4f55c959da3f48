"""Entries on their way to a service that may be away: sent in order by a background thread, kept while it is.

Knows nothing of the service: ``send`` gets the oldest entry, or a run of neighbouring ``metrics`` entries, and raises
where they did not arrive.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from pipelines import storage
from pipelines.redact import one_line

logger = logging.getLogger(__name__)

JOURNAL_FILE = "unsent.jsonl"
"""File of unsent entries, in the journal folder."""

MAX_BATCH_VALUES = 900
"""Values of one ``send``, unless one step alone has more."""

_LONGEST_PAUSE_S = 60.0

_PNG = "png_base64"

EntryKind = Literal["params", "metrics", "tags", "inputs", "artifact", "image", "table", "model", "end"]


class Entry(TypedDict):
    """What is to be sent, also as a line of the journal. Every kind has the fields that its sender reads.

    Attributes:
        kind: of the entry.
        values: params, metrics or tags, by name; in the journal, metrics are text.
        step: of metrics or an image.
        at: time of metrics, in milliseconds since 1970.
        data: fields of the data sets that a run reads.
        path: of an artifact, and ``folder`` that it goes to.
        image: a PIL image; in the journal, its PNG file in base64. ``key`` names it.
        rows: of the table ``name``.
        location: of the model ``name``.
        status: of a run that ended.
    """

    kind: EntryKind
    values: NotRequired[Mapping[str, Any]]
    step: NotRequired[int]
    at: NotRequired[int]
    data: NotRequired[Sequence[Mapping[str, Any]]]
    path: NotRequired[str]
    folder: NotRequired[str]
    image: NotRequired[Any]
    key: NotRequired[str]
    rows: NotRequired[Sequence[Mapping[str, object]]]
    name: NotRequired[str]
    location: NotRequired[str]
    status: NotRequired[str]


class Outbox:
    """A queue with a thread that empties it."""

    def __init__(self, send: Callable[[list[Entry]], None], journal: Path | None = None, told: str = "") -> None:
        """Begin.

        Args:
            send: delivers entries.
            journal: folder that keeps on disk what waits; what an earlier process left there is sent first.
            told: why nothing can be sent, where that is in the log already; a reason is told once.
        """
        self._send = send
        self._told = told
        self._journal = journal / JOURNAL_FILE if journal else None
        self._queue: list[Entry] = self._read_journal()
        self._lock = threading.Lock()
        self._journal_lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._send_loop, name="outbox", daemon=True)
        self._thread.start()

    def put(self, kind: EntryKind, **data: Any) -> None:
        """Take an entry; returns at once."""
        with self._lock:
            self._queue.append(cast(Entry, {"kind": kind, **data}))
        if kind != "metrics":
            self._wake.set()  # metrics come often and travel together

    def keep(self) -> None:
        """Have on disk what waits now: a process that dies from here on loses none of it.

        Where nothing waits, the file is removed, here and at the end alone: a caller may be copying it to a bucket.
        """
        self._write_journal()

    def close(self) -> None:
        """Try to send what waits (for up to a minute); the rest stays in the journal."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=60)
        self._write_journal()
        left = sum(entry["kind"] != "end" for entry in self._queue)
        if left and self._journal:
            logger.warning("%d entries for MLflow wait in %s: the same command sends them.", left, self._journal)
        elif left:
            logger.warning("%d entries for MLflow could not be sent.", left)

    def _send_loop(self) -> None:
        pause = 1.0
        while True:
            self._wake.wait(timeout=pause)
            self._wake.clear()
            closing = self._closing
            sent = self._send_all()
            if closing:
                return
            pause = 1.0 if sent else min(pause * 2, _LONGEST_PAUSE_S)

    def _send_all(self) -> bool:
        """Send the queue, oldest first; False where an entry did not arrive."""
        while self._queue:
            entries = self._next_entries()
            try:
                self._send(entries)
            except Exception as error:  # a service that is down must not stop the work
                reason = one_line(error)
                if reason != self._told:
                    logger.warning("%d entries wait for the tracking service: %s", len(self._queue), reason)
                self._told = reason
                self._write_journal()
                return False
            self._told = ""
            with self._lock:
                del self._queue[: len(entries)]
        return True

    def _next_entries(self) -> list[Entry]:
        """The oldest entry, or as many neighbouring metrics as fit one call; a step's values stay together."""
        with self._lock:
            entries, size = self._queue[:1], len(self._queue[0].get("values", ()))
            for entry in self._queue[1:]:
                size += len(entry.get("values", ()))
                if entry["kind"] != "metrics" or entries[0]["kind"] != "metrics" or size > MAX_BATCH_VALUES:
                    break
                entries.append(entry)
        return entries

    # ------------------------------------------------------------------ the journal

    def _read_journal(self) -> list[Entry]:
        """Entries that an earlier process could not send; its end is none of them, since the run continues."""
        if self._journal is None or not self._journal.is_file():
            return []
        entries = []
        for line in self._journal.read_text().splitlines():
            entry = _parsed(line)
            if entry is None:
                logger.warning("%s has a damaged line, which is left out.", self._journal)
            elif entry["kind"] != "end":
                entries.append(entry)
        return entries

    def _write_journal(self) -> None:
        """Keep what waits; where nothing waits, nothing is kept."""
        if self._journal is None:
            return
        with self._journal_lock:  # of two threads, the later one's entries stay
            with self._lock:
                waiting = list(self._queue)
            try:
                if waiting:
                    storage.write_atomically(str(self._journal), "".join(map(self._line, waiting)).encode())
                elif self._journal.is_file():
                    self._journal.unlink()
            except (storage.DiskFullError, OSError) as error:  # the job continues without its tracking
                logger.warning("what MLflow did not get cannot be kept: %s", error)

    def _line(self, entry: Entry) -> str:
        """An entry as a line of the journal; empty, with a warning, where it cannot be kept."""
        try:
            return json.dumps(_as_text(entry), default=_image_as_text, allow_nan=False) + "\n"
        except (TypeError, ValueError, OSError) as error:  # the job continues without its tracking
            logger.warning("one of the entries for MLflow (%s) cannot be kept: %s", entry["kind"], error)
            return ""


def _image_as_text(value: Any) -> dict[str, str]:
    """A PIL image as JSON can hold it, for ``as_image``."""
    if not hasattr(value, "save"):
        raise TypeError(f"{type(value).__name__} is no value of JSON")
    content = io.BytesIO()
    value.save(content, format="PNG")
    return {_PNG: base64.b64encode(content.getvalue()).decode()}


def as_image(value: Any) -> Any:
    """An entry's image, also of one that was read from the journal; other values stay as they are."""
    if not (isinstance(value, dict) and _PNG in value):
        return value
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(value[_PNG])))


def _parsed(line: str) -> Entry | None:
    """A line of the journal; None where it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return cast(Entry, entry) if isinstance(entry, dict) and "kind" in entry else None


def _as_text(entry: Entry) -> Entry:
    """An entry as JSON can hold it, which has no NaN: numbers of metrics become text, those of a table None."""
    if entry["kind"] == "metrics":
        return {**entry, "values": {key: repr(float(value)) for key, value in entry["values"].items()}}
    if entry["kind"] == "table":
        rows = [{key: _finite(value) for key, value in row.items()} for row in entry["rows"]]
        return {**entry, "rows": rows}
    return entry


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
