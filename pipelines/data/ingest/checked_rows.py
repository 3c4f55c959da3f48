"""Samples of a unit that passed every check, with their line of the index.

Some samples at a time go through one step after the other. Decoding an image empties the processor's caches of what the
other steps need: taken in turns with it, each of them takes twice as long (0.3 ms of 2.3 per row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from pipelines.data.ingest.check_images import CheckedImage, Header, decode_checked, read_header
from pipelines.data.ingest.check_rows import check_boxes, check_row
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import Changes, ReadResult, Rejected, SourceUnit, rejection
from pipelines.settings import PrepareDataSettings
from tinygptv.data.sample import SampleRow
from tinygptv.lru import LRU

_KEPT_IMAGES = 32

_BATCH_ROWS, _BATCH_BYTES = 32, 8 << 20
"""Samples that go through the steps together: at most so many, and no more once their images have so many bytes."""

_Found = TypeVar("_Found", SampleRow, "_Row")
_Checked = TypeVar("_Checked")


@dataclass(frozen=True)
class IndexEntry:
    """A row's line of the index; see ``staging.INDEX_SCHEMA``.

    Attributes:
        id: of the row.
        content_hash: of its image, texts and boxes.
        image_hash: of the encoded image; 0 where there is none.
        perceptual_hash: of the image.
        width: of the original image in pixels.
        height: the same.
        image_bytes: size of the stored image.
        words: of the first answers.
        kept: the image kept its bytes.
    """

    id: str
    content_hash: bytes
    image_hash: int = 0
    perceptual_hash: int = 0
    width: int = 0
    height: int = 0
    image_bytes: int = 0
    words: int = 0
    kept: bool = False


@dataclass
class _Row:
    """A sample between the steps of its check.

    Attributes:
        row: with its texts checked, later with the checked image.
        image_digest: of the bytes that the source gave; empty where there is no image.
        header: of that image.
        image: that image, checked.
    """

    row: SampleRow
    image_digest: bytes = b""
    header: Header | None = None
    image: CheckedImage | None = None


def checked_rows(
    unit: SourceUnit, settings: PrepareDataSettings, changes: Changes
) -> Iterator[tuple[SampleRow, IndexEntry] | Rejected]:
    """Read and check a unit's samples, in their order.

    Args:
        unit: what to read.
        settings: checks, filters, sizes.
        changes: counts samples that are kept, but changed.

    Yields:
        A row that passed every check, with its line of the index; or what was set apart.

    Raises:
        OSError: an input file cannot be read.
    """
    web = SOURCES[unit.source.source].web
    images = _ImageChecker(settings)

    def check_texts(found: SampleRow) -> _Row:
        row = check_row(found, web=web, settings=settings, changes=changes)
        if row.image is None:
            return _Row(row)
        digest = hashlib.sha256(row.image).digest()[:16]  # a processor has instructions for this one
        return _Row(row, digest, images.read_header(row.image, digest))

    def check_image(found: _Row) -> _Row:
        if found.row.image is not None and found.header is not None:
            found.image = images.check(found.row.image, found.image_digest, found.header)
        return found

    def attempt(step: Callable[[_Found], _Checked], found: _Found | Rejected) -> _Checked | Rejected:
        if isinstance(found, Rejected):
            return found
        try:
            return step(found)
        except Exception as error:  # whatever is in a row costs that row alone
            row = found.row if isinstance(found, _Row) else found
            return rejection(unit, row.id.removeprefix(unit.row_id("")), error)

    for batch in _batches(SOURCES[unit.source.source].reader.read(unit, changes)):
        with_texts = [attempt(check_texts, found) for found in batch]
        with_images = [attempt(check_image, found) for found in with_texts]
        yield from [attempt(partial(_index_row, changes), found) for found in with_images]


def _batches(found: Iterable[ReadResult]) -> Iterator[list[ReadResult]]:
    """Consecutive samples, some at a time: bounded in number and bytes."""
    batch: list[ReadResult] = []
    num_bytes = 0
    for sample in found:
        batch.append(sample)
        num_bytes += len(getattr(sample, "image", None) or b"")
        if len(batch) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _index_row(changes: Changes, found: _Row) -> tuple[SampleRow, IndexEntry]:
    """The row as it is stored, and its line of the index."""
    row, digest, image = found.row, found.image_digest, found.image
    if image is not None:
        row = replace(row, image=image.data, width=image.width, height=image.height)
    row = check_boxes(row, changes)
    content = json.dumps([row.task, [[turn.question, *turn.answers] for turn in row.turns], row.boxes])
    content_hash = hashlib.blake2b(digest + content.encode(), digest_size=16).digest()
    words = sum(len(turn.answers[0].split()) for turn in row.turns)
    if image is None:
        return row, IndexEntry(row.id, content_hash, words=words)
    return row, IndexEntry(
        row.id,
        content_hash,
        int.from_bytes(digest[:8], "big"),
        image.perceptual_hash,
        image.width,
        image.height,
        len(image.data),
        words,
        image.kept,
    )


class _ImageChecker:
    """Checks images; remembers the last few, because neighbouring rows often share one."""

    def __init__(self, settings: PrepareDataSettings) -> None:
        self.settings = settings
        self._kept: LRU[bytes, CheckedImage] = LRU(_KEPT_IMAGES)
        self._headers: LRU[bytes, Header] = LRU(_KEPT_IMAGES)

    def read_header(self, data: bytes, digest: bytes) -> Header:
        return self._headers.get_or_make(digest, lambda: read_header(data, self.settings))

    def check(self, data: bytes, digest: bytes, header: Header) -> CheckedImage:
        return self._kept.get_or_make(digest, lambda: decode_checked(data, header, self.settings))
