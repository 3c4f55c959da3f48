"""The report's page shows the counts that it was given."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.ingest import report
from pipelines.data.ingest.staging import INDEX_SCHEMA
from pipelines.data.shard_format import Manifest, ShardInfo
from pipelines.data.shards import ShardSet
from pipelines.data.sources.base import Rejected
from tests.source_files import encode, picture
from tinygptv.data.images import open_image
from tinygptv.data.sample import SampleRow, Turn


def test_bars_have_their_bins_counts_and_heights():
    drawing = report._histogram("Words", (0, 1, 2, 5, 10), [0, 2, 0, 8, 0])
    titles = re.findall(r"<title>(.*?)</title>", drawing)
    assert titles == ["1 to 2: 2", "2 to 5: 0", "5 to 10: 8"], "empty bins at both ends are left out"
    heights = [float(height) for height in re.findall(r' height="([\d.]+)" rx', drawing)]
    assert heights == [30, 0, 120]
    assert "<figcaption>Words</figcaption>" in drawing


@pytest.mark.parametrize(("counts", "room"), [([4, 1], 70), ([4, 1, 2, 3, 5, 1, 2, 4], 52.5)])
def test_bars_stand_side_by_side_over_their_lower_borders(counts, room):
    """At most 420 wide, and no bar wider than a sixth of that."""
    borders = (0, 0.25, 1.0, *range(3, 9))
    drawing = report._histogram("Words", borders, [0, *counts])
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawing)
    wanted = []
    for place, count in enumerate(counts):
        tall = 120 * count / max(counts)
        wanted.append([place * room + 1, 120 - tall, room - 2, tall])
    assert [list(map(float, bar)) for bar in bars] == [pytest.approx(bar, abs=0.051) for bar in wanted]
    labels = re.findall(r'<text x="([\d.]+)" y="133">(.*?)</text>', drawing)
    assert [text for _, text in labels] == [f"{border:g}" for border in borders[1 : len(counts) + 1]]
    assert [float(x) for x, _ in labels] == pytest.approx([(n + 0.5) * room for n in range(len(counts))], abs=0.051)
    assert '<svg viewBox="0 0 420 138">' in drawing


def test_the_last_bin_is_open():
    drawing = report._histogram("Words", (0, 1), [0, 1200])
    assert re.findall(r"<title>(.*?)</title>", drawing) == ["1 to more: 1,200"]


def index(*rows):
    """Lines of an index: width, height, bytes of the image, words, whether it kept its bytes."""
    names = ("width", "height", "image_bytes", "words", "kept")
    lines = [{"id": "", "content_hash": bytes(16), **dict(zip(names, row, strict=True))} for row in rows]
    return pa.Table.from_pylist(lines, INDEX_SCHEMA)


def test_totals_count_each_row_in_its_bin_and_each_shard_by_itself():
    totals = report.Totals()
    totals.add(index((64, 32, 2000, 1, True), (128, 64, 4999, 3, False)))
    totals.add(index((0, 0, 0, 7, False)))
    totals.next_shard()
    totals.add(index((4096, 63, 5000, 250, True)))
    totals.next_shard()
    assert (totals.images, totals.kept_images) == (3, 2)
    bins = {
        name: {report.BINS[name][bin]: int(count) for bin, count in enumerate(counts) if count}
        for name, counts in totals.histograms.items()
    }
    assert bins == {
        "width": {64: 1, 128: 1, 4096: 1},
        "height": {0: 2, 64: 1},
        "aspect_ratio": {2: 2, 4: 1},
        "image_kilobytes": {2: 2, 5: 1},
        "words": {1: 1, 3: 1, 5: 1, 200: 1},
    }
    first, second = totals.shard_statistics
    assert first["words"] == {"least": 1, "mean": 3.67, "most": 7}
    assert first["image_bytes"] == {"least": 0, "mean": 2333, "most": 4999}
    assert second["words"] == {"least": 250, "mean": 250, "most": 250}


def test_bins_begin_at_nothing_and_end_at_round_numbers():
    for borders in report.BINS.values():
        assert borders[0] == 0 and list(borders) == sorted(set(borders))
    assert report.BINS["width"] == report.BINS["height"]
    assert all(border % 64 == 0 for border in report.BINS["width"])
    assert [border for border in report.BINS["image_kilobytes"] if border % 5] == [2]


@pytest.mark.parametrize("name", report.BINS)
def test_bins_ascend_from_nothing(name):
    borders = report.BINS[name]
    assert borders[0] == 0 and all(low < high for low, high in itertools.pairwise(borders)) and report.TITLES[name]
    totals = report.Totals()
    totals._count(name, np.array([border + step for border in borders for step in (0, 0.01)]))
    assert totals.histograms[name].tolist() == [2] * len(borders)


def test_an_image_of_one_pixel_is_an_image():
    totals = report.Totals()
    totals.add(index((1, 4, 2000, 1, True), (0, 0, 0, 1, False)))
    assert totals.images == 1 and totals.histograms["aspect_ratio"][1] == 1 == totals.histograms["width"].sum()


def test_reasons_are_counted_without_names_and_numbers_and_the_first_is_the_example():
    totals = report.Totals()
    totals.add_rejected(
        [
            Rejected("a", "0.tar", "image a.jpg has 3 x 4 pixels"),
            Rejected("b7", "0.tar", "image b7.jpg has 5 x 60 pixels"),
            Rejected("c", "0.tar", "the key 'k' of c"),
            Rejected("d", "0.tar", "too few words", filter="min_words"),
        ]
    )
    assert totals.reasons == {"image .. has N x N pixels": 2, "the key '..' of ..": 1}
    assert totals.examples["image .. has N x N pixels"] == "image a.jpg has 3 x 4 pixels"


@pytest.mark.parametrize(
    ("key", "reason", "general"),
    [
        ("a.b", "image x/a.b.JPG of a.b, not aXb", "image .. of .., not aXb"),
        ("", "member dir/12.json has 1,200 bytes", "member .. has N,N bytes"),
        ("a", "a cat, a", ".. cat, .."),
        ("q", "'it' and 'that'", "'..' and '..'"),
    ],
)
def test_what_differs_from_sample_to_sample_is_taken_out_of_a_reason(key, reason, general):
    assert report.general_reason(Rejected(key, "0.tar", reason)) == general


def test_the_report_tells_the_set_its_counts_and_the_commonest_reasons(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_MOST_REASONS", 2)
    pages = []
    monkeypatch.setattr(report, "_page", lambda *given: pages.append(given) or "a p\xe4ge")
    totals = report.Totals()
    totals.add(index((64, 32, 2000, 1, True), (128, 64, 4999, 3, False), (0, 0, 0, 5, False)))
    for reason, count in (("rare", 1), ("b\xe4d", 3), ("odd", 2)):
        totals.add_rejected([Rejected("k", "0.tar", reason)] * count)
    counts = {"rows_in": 9, "rows_out": 3, "filters": {}, "changes": {}}
    infos = (ShardInfo("a.arrow", 0, 10, "x"), ShardInfo("b.arrow", 0, 32, "y"))
    manifest = Manifest("mine", infos, counts, {"image_size": 64})
    report.write_report(str(tmp_path), ShardSet(str(tmp_path), manifest), totals)
    text = (tmp_path / "report.json").read_text("utf-8")
    content = json.loads(text)
    assert pages == [(content, manifest, [])] and (tmp_path / "report.html").read_text("utf-8") == "a p\xe4ge"
    assert text.endswith("}\n") and "b\xe4d" in text
    histograms = content.pop("histograms")
    assert content == {
        "source": "mine",
        "counts": counts,
        "settings": {"image_size": 64},
        "shards": 2,
        "bytes": 42,
        "images": 2,
        "images_with_original_bytes": 1,
        "quarantine_reasons": {"b\xe4d": 3, "odd": 2},
    }
    assert list(histograms) == ["width", "height", "aspect_ratio", "image_kilobytes", "words"]
    for name, histogram in histograms.items():
        assert histogram == {"lower_borders": list(report.BINS[name]), "rows": totals.histograms[name].tolist()}


def test_the_page_shows_each_distribution_and_each_sample():
    content = {"counts": {name: 0 for name in report._TILES}, "shards": 0, "quarantine_reasons": {}}
    content["counts"] |= {"near_duplicates": 0, "filters": {}, "changes": {}}
    rows = {name: [0, *([number] * (number + 1))] for number, name in enumerate(report.BINS)}
    content["histograms"] = {name: {"rows": counts} for name, counts in rows.items()}
    samples = [SampleRow(f"id {n}", "s", "pair", (Turn("q", (f"a {n}", "b")),), encode(picture(n))) for n in range(2)]
    page = report._page(content, Manifest("x", (), content["counts"]), samples)
    drawn = [name for name in report.BINS if sum(rows[name])]
    bars = "".join(report._histogram(report.TITLES[name], report.BINS[name], rows[name]) for name in drawn)
    assert f'<div class="charts">{bars}</div>' in page and "width" not in drawn
    shown = "".join(report._sample(row) for row in samples)
    assert f'<div class="samples">{shown}</div>' in page and "q - a 1<i>id 1</i>" in shown
    images = re.findall(r'<img src="data:image/jpeg;base64,(.*?)" alt="">', page)
    for data, row in zip(images, samples, strict=True):
        assert base64.b64decode(data) == report._thumbnail(row.image)


def test_sample_images_are_spread_over_the_whole_set():
    class Rows:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def rows(self, numbers):
            return list(numbers)

    found = report._sample_rows(Rows(1000))
    assert (len(found), found[0], found[-1]) == (report.SAMPLE_IMAGES, 0, 999)
    assert max(b - a for a, b in itertools.pairwise(found)) <= 44
    assert report._sample_rows(Rows(2)) == [0, 1] and report._sample_rows(Rows(0)) == []


def test_the_pages_numbers_are_those_of_the_counts():
    counts = {"rows_in": 21, "rows_out": 6, "duplicates": 2, "filtered": 3, "quarantined": 4, "near_duplicates": 5}
    counts |= {"filters": {"min_side": 3}, "changes": {"box_clipped": 7}}
    content = {"counts": counts, "shards": 8, "quarantine_reasons": {"<bad>": 4}}
    content["histograms"] = {name: {"rows": [0] * len(borders)} for name, borders in report.BINS.items()}
    page = report._page(content, Manifest("a & b", (), counts, {"image_size": 64}), [])
    tiles = re.findall(r"<div class=tile><b>(\d+)</b><span>(.*?)</span>", page)
    assert [(int(value), name) for value, name in tiles] == [
        (21, "rows in"),
        (6, "rows out"),
        (2, "duplicates"),
        (3, "filtered"),
        (4, "quarantined"),
        (5, "near-duplicates (kept)"),
        (8, "shards"),
    ]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert rows == [("min_side", "3"), ("&lt;bad&gt;", "4"), ("box_clipped", "7"), ("image_size", "64")]
    heads = [("filter", "rows removed"), ("reason", "samples"), ("change", "rows"), ("setting", "value")]
    assert re.findall(r"<tr><th>(.*?)</th><th>(.*?)</th></tr>", page) == heads
    assert "<title>a &amp; b: prepared data</title>" in page and "<figure>" not in page
    nothing = {**content, "counts": {**counts, "filters": {}, "changes": {}}, "quarantine_reasons": {}}
    page = report._page(nothing, Manifest("x", (), counts), [])
    for sentence in ("No filter removed a row.", "Nothing was set apart.", "No text or box was changed."):
        assert f"<p>{sentence}</p>" in page


@pytest.mark.parametrize(("size", "shown"), [((336, 84), (168, 42)), ((90, 120), (90, 120)), ((1000, 1), (168, 1))])
def test_thumbnails_keep_the_aspect_ratio_and_never_grow(size, shown):
    image = Image.new("RGB", size, (200, 30, 60))
    small = open_image(report._thumbnail(encode(image)))
    assert small.size == shown and np.abs(np.asarray(small, dtype=int) - (200, 30, 60)).max() <= 4


@pytest.mark.security
@pytest.mark.parametrize("longest", [160, 161])
def test_a_samples_words_and_id_are_text_of_a_bounded_length(longest):
    question, answer = "<q>", "<" * (longest - 6)
    sample = report._sample(SampleRow("<script>", "s", "text", (Turn(question, (answer,)),)))
    words = f"{question} - {answer}" if longest <= 160 else f"{question} - {answer[:151]}..."
    caption = f"<figcaption>{html.escape(words)}<i>&lt;script&gt;</i></figcaption>"
    assert sample == f"<figure class=sample><div class=noimage>text only</div>{caption}</figure>"
    assert "<figcaption>only an answer<i>" in report._sample(
        SampleRow("a", "s", "text", (Turn("", ("only an answer",)),))
    )
