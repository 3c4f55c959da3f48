"""Samples of a unit that passed every check, with their line of the index.

Some samples at a time go through one step after the other. Decoding an image empties the processor's caches of what the
other steps need: taken in turns with it, each of them takes twice as long (0.3 ms of 2.3 per row).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar

from pipelines.data.ingest.check_images import CheckedImage, Header, decode_checked, perceptual_hashes, read_header
from pipelines.data.ingest.check_rows import check_boxes, check_row
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import Changes, ReadResult, Rejected, SourceUnit, rejection
from pipelines.settings import PrepareDataSettings
from tinygptv.data.sample import SampleRow
from tinygptv.lru import LRU

_KEPT_IMAGES, _KEPT_IMAGE_BYTES = 32, 256 << 10
"""Images that are remembered for the rows that follow; a larger one takes the room of several."""

_BATCH_ROWS, _BATCH_BYTES = 32, 8 << 20
"""Samples that go through the steps together: at most so many, and no more once their images have so many bytes."""

_Found = TypeVar("_Found", SampleRow, "_Row")
_Checked = TypeVar("_Checked")


class IndexEntry(NamedTuple):
    """A row's line of the index; see ``staging.INDEX_SCHEMA``.

    Attributes:
        id: of the row.
        content_hash: of its image as it is stored, texts and boxes.
        image_hash: of the image as it is stored; 0 where there is none.
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


@dataclass(eq=False)
class _Image:
    """An image between the steps of its check; rows near each other that have the same one share this.

    Attributes:
        data: as the source gave it.
        header: of that.
        checked: the image, checked; None before that step.
        digest: of its stored bytes; likewise.
        perceptual_hash: likewise.
    """

    data: bytes
    header: Header
    checked: CheckedImage | None = None
    digest: bytes = b""
    perceptual_hash: int | None = None


@dataclass
class _Row:
    """A sample between the steps of its check: with its texts checked, and its image where it has one."""

    row: SampleRow
    image: _Image | None = None


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
    images = _RecentImages(settings)

    def check_texts(found: SampleRow) -> _Row:
        row = check_row(found, web=web, settings=settings, changes=changes)
        return _Row(row, None if row.image is None else images.get(row.image))

    def check_image(found: _Row) -> _Row:
        image = found.image
        if image is not None and image.checked is None:
            image.checked = decode_checked(image.data, image.header, settings)
            image.digest = hashlib.sha256(image.checked.data).digest()[:16]  # a processor has instructions for it
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
        _add_perceptual_hashes([found for found in with_images if isinstance(found, _Row)])
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


def _add_perceptual_hashes(rows: Sequence[_Row]) -> None:
    images = {id(row.image): row.image for row in rows if row.image and row.image.perceptual_hash is None}.values()
    coarse = [image.checked.coarse for image in images if image.checked]
    for image, value in zip(images, perceptual_hashes(coarse), strict=True):
        image.perceptual_hash = value


def _index_row(changes: Changes, found: _Row) -> tuple[SampleRow, IndexEntry]:
    """The row as it is stored, and its line of the index."""
    row, image = found.row, found.image
    checked, digest = (image.checked, image.digest) if image else (None, b"")
    if checked is not None:
        row = replace(row, image=checked.data, width=checked.width, height=checked.height)
    row = check_boxes(row, changes)
    turns = [[turn.question, *turn.answers] for turn in row.turns]
    content = json.dumps([row.task, turns, row.boxes, row.width, row.height])
    content_hash = hashlib.blake2b(digest + content.encode(), digest_size=16).digest()
    words = sum(len(turn.answers[0].split()) for turn in row.turns)
    if image is None or checked is None:
        return row, IndexEntry(row.id, content_hash, words=words)
    return row, IndexEntry(
        row.id,
        content_hash,
        int.from_bytes(digest[:8], "big"),
        image.perceptual_hash or 0,
        checked.width,
        checked.height,
        len(checked.data),
        words,
        checked.kept,
    )


class _RecentImages:
    """The last few images: neighbouring rows often have the same one, which is then decoded once."""

    def __init__(self, settings: PrepareDataSettings) -> None:
        self._settings = settings
        self._images: LRU[tuple[int, bytes], _Image] = LRU(_KEPT_IMAGES, _room_of)

    def get(self, data: bytes) -> _Image:
        """The image of these bytes, its header checked.

        Raises:
            Malformed, Filtered: see ``read_header``.
        """
        # Most images come once. Some of their bytes tell them apart for a hundredth of what a hash of all takes.
        middle = len(data) // 2
        key = len(data), data[middle : middle + 32]
        image = self._images.get(key)
        if image is None or image.data != data:
            image = _Image(data, read_header(data, self._settings))
            self._images.put(key, image)
        return image


def _room_of(image: _Image) -> int:
    return max(1, len(image.data) // _KEPT_IMAGE_BYTES)
