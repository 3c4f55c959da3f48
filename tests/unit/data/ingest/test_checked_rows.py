"""Samples go through the checks some at a time: the order, and what each step sets apart, stay as they are."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.data.ingest import checked_rows as module
from pipelines.data.ingest.checked_rows import checked_rows
from pipelines.data.sources import SOURCES
from pipelines.data.sources.base import Rejected, Source, SourceInput, SourceUnit
from pipelines.settings import PrepareDataSettings
from pipelines.storage import Location
from tests.source_files import jpeg, sample, write_tar
from tinygptv.data.sample import SampleRow, Turn

SOUND = "a sound caption"
SAMPLES = {
    "0": (jpeg(0), SOUND),
    "1": (jpeg(1), " "),  # fails where texts are checked
    "2": (jpeg(2, (300, 20)), SOUND),  # where headers are read
    "3": (jpeg(3)[:-200], SOUND),  # where images are decoded
    "4": (b"no image", SOUND),  # where the source is read
    "5": (jpeg(5), SOUND),
    "6": (jpeg(0), SOUND),
}
REASONS = {"1": "an answer is empty", "2": "aspect ratio", "3": "image", "4": "image"}


def read(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [member for key, found in SAMPLES.items() for member in sample(key, *found)])
    settings = PrepareDataSettings(source="laion", input=str(tar), min_side=1, max_aspect_ratio=9, min_words=0)
    (unit,) = SOURCES["laion"].reader.plan(SourceInput("laion", str(tar), "", "laion", ""))
    return list(checked_rows(unit, settings, Counter()))


@pytest.mark.parametrize("num_rows", [1, 3, 32])
def test_samples_stay_in_order_whatever_sets_them_apart(tmp_path, monkeypatch, num_rows):
    monkeypatch.setattr(module, "_BATCH_ROWS", num_rows)
    found = read(tmp_path)
    keys = [one.key if isinstance(one, Rejected) else one[0].id.rpartition("/")[2] for one in found]
    assert keys == list(SAMPLES)
    rejected = {one.key: one.reason for one in found if isinstance(one, Rejected)}
    assert rejected.keys() == REASONS.keys()
    for key, reason in REASONS.items():
        assert reason in rejected[key]
    rows, entries = zip(*(one for one in found if not isinstance(one, Rejected)), strict=True)
    digests = [hashlib.sha256(row.image).digest() for row in rows]
    assert [entry.image_hash for entry in entries] == [int.from_bytes(digest[:8], "big") for digest in digests]
    assert entries[0].perceptual_hash == entries[2].perceptual_hash != entries[1].perceptual_hash


@pytest.mark.parametrize(("source", "filtered"), [("laion", True), ("webdataset", True), ("jsonl", False)])
def test_captions_of_the_web_are_filtered_and_no_others(tmp_path, source, filtered):
    if source == "jsonl":
        path = tmp_path / "0.jsonl"
        path.write_text('{"caption": "word", "task": "text"}\n')
    else:
        path = write_tar(tmp_path / "0.tar", sample("a", jpeg(0), "word"))
    settings = PrepareDataSettings(source=source, input=str(path), min_words=2)
    (unit,) = SOURCES[source].reader.plan(SourceInput(source, str(path), str(tmp_path), source, SOURCES[source].task))
    (found,) = checked_rows(unit, settings, Counter())
    assert (isinstance(found, Rejected) and found.filter == "min_words") is filtered


def test_batches_are_bounded_in_number_and_bytes(monkeypatch):
    class Sample:
        def __init__(self, num_bytes):
            self.image = bytes(num_bytes) or None

    monkeypatch.setattr(module, "_BATCH_ROWS", 3)
    monkeypatch.setattr(module, "_BATCH_BYTES", 10)
    sizes = [4, 5, 0, 3, 7, 11, 4, Rejected("k", "s", "r")]
    samples = [size if isinstance(size, Rejected) else Sample(size) for size in sizes]
    batches = list(module._batches(iter(samples)))
    assert [len(batch) for batch in batches] == [3, 2, 1, 2]
    assert [found for batch in batches for found in batch] == samples


def checked(monkeypatch, *rows):
    """Rows as a source of one's own would give them, after every check."""
    reader = SimpleNamespace(read=lambda unit, changes: iter(rows))
    monkeypatch.setitem(SOURCES, "jsonl", Source("", reader))
    unit = SourceUnit(SourceInput("jsonl", "", "", "own", ""), Location("", "/own.jsonl"), "own.jsonl")
    return list(checked_rows(unit, PrepareDataSettings(image_size=64), Counter()))


def test_rows_are_the_same_where_image_texts_and_boxes_are(monkeypatch):
    turns = (Turn("", ("a star",)), Turn("q", ("b", "c d")))
    row = SampleRow("a", "x", "refer", turns, jpeg(0, (300, 200)), boxes=((1, 2, 290, 190),))
    others = [
        replace(row, image=jpeg(1, (300, 200))),
        replace(row, boxes=((1, 2, 290, 191),)),
        replace(row, task="identify"),
        replace(row, turns=turns[:1]),
        replace(row, turns=(turns[0], Turn("q", ("b", "c e")))),
        replace(row, turns=(turns[0], Turn("r", ("b", "c d")))),
    ]
    (stored, entry), (_, same), *rest = checked(monkeypatch, row, replace(row, id="b", source="y"), *others)
    assert (stored.width, stored.height, stored.boxes) == (300, 200, row.boxes), "of the original"
    assert (entry.width, entry.height, entry.words, entry.kept) == (300, 200, 3, False)
    assert entry.image_bytes == len(stored.image) < len(row.image)
    hashes = {other.content_hash for _, other in rest}
    assert same.content_hash == entry.content_hash not in hashes and len(hashes) == len(others)


CAPTIONED = SampleRow("a", "x", "caption", (Turn("", ("a star",)),), jpeg(0, (300, 200)))


def test_rows_are_the_same_where_their_stored_images_are(monkeypatch):
    """What a decoder does not look at makes no other image; an image that keeps its bytes keeps that, too."""
    small = jpeg(0, (48, 40))
    same = [jpeg(0, (300, 200)) + b"behind the image", small, small + b"behind the image"]
    entries = [
        entry for _, entry in checked(monkeypatch, CAPTIONED, *(replace(CAPTIONED, image=data) for data in same))
    ]
    assert entries[0].content_hash == entries[1].content_hash and entries[0].image_hash == entries[1].image_hash
    assert len({entry.content_hash for entry in entries}) == len({entry.image_hash for entry in entries}) == 3


def test_rows_of_originals_of_different_sizes_are_different(monkeypatch):
    """Boxes are in pixels of the original."""
    sizes = iter([(300, 200), (600, 400)])

    def decode(data, header, settings):
        width, height = next(sizes)
        return module.CheckedImage(b"the same", width, height, np.zeros((32, 32), np.uint8), kept=False)

    monkeypatch.setattr(module, "decode_checked", decode)
    (_, first), (_, second) = checked(monkeypatch, CAPTIONED, replace(CAPTIONED, image=jpeg(1)))
    assert first.image_hash == second.image_hash and first.content_hash != second.content_hash


def test_rows_without_an_image_are_known_by_their_texts(monkeypatch):
    """Beside rows with one, in one batch."""
    text = SampleRow("t", "x", "text", (Turn("q", ("a b", "c")), Turn("r", ("d",))))
    rows = [text, CAPTIONED, replace(text, id="u"), replace(text, id="v", turns=text.turns[::-1])]
    found = checked(monkeypatch, *rows)
    assert [row for row, _ in found][::2] == [text, replace(text, id="u")]
    (_, first), (_, image), (_, same), (_, other) = found
    assert first == module.IndexEntry("t", first.content_hash, 0, 0, 0, 0, 0, 3, False)
    assert same == first._replace(id="u") and other == first._replace(id="v", content_hash=other.content_hash)
    assert {len(entry.content_hash) for _, entry in found} == {16}
    assert len({entry.content_hash for entry in (first, image, other)}) == 3
    assert image.image_hash and image.perceptual_hash


def count_decoded(monkeypatch):
    decoded = []
    decode = module.decode_checked
    monkeypatch.setattr(module, "decode_checked", lambda data, *more: decoded.append(data) or decode(data, *more))
    return decoded


@pytest.mark.parametrize("num_rows", [1, 32])
def test_an_image_of_several_rows_is_decoded_once(monkeypatch, num_rows):
    monkeypatch.setattr(module, "_BATCH_ROWS", num_rows)
    decoded = count_decoded(monkeypatch)
    images = [jpeg(0), jpeg(1), bytes(bytearray(jpeg(0))), jpeg(1)[:-200], jpeg(0)]
    found = checked(monkeypatch, *(replace(CAPTIONED, image=data) for data in images))
    assert decoded == [images[0], images[1], images[3]]
    hashes = [one[1].image_hash for one in found if not isinstance(one, Rejected)]
    assert hashes == [hashes[0], hashes[1], hashes[0], hashes[0]] and hashes[0] != hashes[1]
    values = [one[1].perceptual_hash for one in found if not isinstance(one, Rejected)]
    assert values == [values[0], values[1], values[0], values[0]] and values[0] != values[1]


def test_images_that_differ_in_few_bytes_are_told_apart(monkeypatch):
    decoded = count_decoded(monkeypatch)
    first = jpeg(0) + b"1"
    second = jpeg(0) + b"2"
    checked(monkeypatch, *(replace(CAPTIONED, image=data) for data in (first, second, first)))
    assert decoded == [first, second, first]


def test_remembered_images_are_bounded_in_number_and_bytes(monkeypatch):
    monkeypatch.setattr(module, "read_header", lambda data, settings: None)
    monkeypatch.setattr(module, "_KEPT_IMAGE_BYTES", 10)
    images = module._RecentImages(PrepareDataSettings())
    for number in range(40):
        images.get(bytes([number]))
    assert len(images._images) == 32
    images.get(bytes(125))
    assert len(images._images) == 32 - 12 + 1
    images.get(bytes(1000))
    assert len(images._images) == 1
