"""The report of an ingest: what went in, what came out, what was set apart and why; as JSON and as one page.

The page needs no other file and no network: histograms are inline SVG, sample images are embedded.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any, Literal, TypedDict

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from pipelines import storage
from pipelines.data.shard_format import Manifest, RowCounts, Spread
from pipelines.data.shards import ShardSet
from pipelines.data.sources.base import Rejected
from tinygptv.data.images import open_image
from tinygptv.data.sample import SampleRow

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"

SAMPLE_IMAGES = 24
_THUMBNAIL_SIDE = 168
_MOST_REASONS = 50

BINS: dict[str, tuple[float, ...]] = {
    "width": (0, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096),
    "height": (0, 64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096),
    "aspect_ratio": (0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 2, 4),
    "image_kilobytes": (0, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 400),
    "words": (0, 1, 2, 3, 5, 8, 12, 16, 24, 32, 50, 100, 200),
}
"""Lower borders of the histograms' bins; the last one is open."""

TITLES = {
    "width": "Width of the original (pixels)",
    "height": "Height of the original (pixels)",
    "aspect_ratio": "Width / height",
    "image_kilobytes": "Stored image (kB)",
    "words": "Words of the answer",
}

_STATISTICS = ("width", "height", "image_bytes", "words")


@dataclass
class Totals:
    """Counts that are kept while shards are planned: histograms over all rows, statistics per shard, reasons.

    Attributes:
        histograms: name -> rows per bin.
        kept_images: rows whose image kept its bytes.
        images: rows with an image.
        reasons: quarantine reason, with names and numbers taken out -> samples.
        examples: the same -> the first such reason as it was.
        changes: kind of change -> rows that were kept, but changed so.
        shard_statistics: least, mean and most of each column, per shard.
    """

    histograms: dict[str, np.ndarray] = field(
        default_factory=lambda: {name: np.zeros(len(borders), dtype=np.int64) for name, borders in BINS.items()}
    )
    kept_images: int = 0
    images: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    shard_statistics: list[dict[str, Spread]] = field(default_factory=list)
    _waiting: list[pa.Table] = field(default_factory=list)

    def add(self, index: pa.Table) -> None:
        """Count rows; see ``staging.INDEX_SCHEMA``."""
        self._waiting.append(index)
        width, height = index["width"].to_numpy(), index["height"].to_numpy()
        with_image = width > 0
        self.images += int(with_image.sum())
        self.kept_images += int(index["kept"].to_numpy(zero_copy_only=False).sum())
        self._count("words", index["words"].to_numpy())
        self._count("width", width[with_image])
        self._count("height", height[with_image])
        self._count("aspect_ratio", width[with_image] / height[with_image])
        self._count("image_kilobytes", index["image_bytes"].to_numpy()[with_image] / 1000)

    def add_rejected(self, rejected: Iterable[Rejected]) -> None:
        """Count why samples gave no row."""
        for found in rejected:
            if not found.filter:
                reason = general_reason(found)
                self.reasons[reason] += 1
                self.examples.setdefault(reason, found.reason)

    def next_shard(self) -> None:
        """The rows since the last call are one shard."""
        table = pa.concat_tables(self._waiting)
        self._waiting = []
        self.shard_statistics.append({name: _spread(table[name].to_numpy()) for name in _STATISTICS})

    def _count(self, name: str, values: np.ndarray) -> None:
        borders = np.array(BINS[name])
        bins = np.searchsorted(borders, values, side="right") - 1
        self.histograms[name] += np.bincount(bins, minlength=len(borders))


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        return {"least": 0, "mean": 0, "most": 0}
    return {"least": int(values.min()), "mean": round(float(values.mean()), 2), "most": int(values.max())}


def general_reason(found: Rejected) -> str:
    """A reason without what differs from sample to sample, so that equal troubles are counted together."""
    reason = found.reason
    if found.key:  # as a word: the key "a" is in many others
        reason = re.sub(rf"(?<!\w){re.escape(found.key)}(?!\w)", "..", reason)
    reason = re.sub(r"(image|member) \S*\.[A-Za-z0-9]+", r"\1 ..", reason)
    reason = re.sub(r"'[^']*'", "'..'", reason)
    return re.sub(r"\d+", "N", reason)


class Histogram(TypedDict):
    """Rows of each bin."""

    lower_borders: list[float]
    rows: list[int]


class ReportContent(TypedDict):
    """``report.json``.

    Attributes:
        source: data set name.
        counts: samples by outcome.
        settings: that decide what the set holds.
        shards: number of them.
        bytes: of the shards.
        images: rows with an image.
        images_with_original_bytes: rows whose image kept its bytes.
        quarantine_reasons: reason -> samples, the most frequent ones.
        histograms: by name.
    """

    source: str
    counts: RowCounts
    settings: dict[str, object]
    shards: int
    bytes: int
    images: int
    images_with_original_bytes: int
    quarantine_reasons: dict[str, int]
    histograms: dict[str, Histogram]


def write_report(output: str, shards: ShardSet, totals: Totals) -> None:
    """Write report.json and report.html into the output folder.

    Args:
        output: folder of the shard set.
        shards: the finished set; its manifest need not be written yet.
        totals: counted while it was made.
    """
    manifest = shards.manifest
    content: ReportContent = {
        "source": manifest.source,
        "counts": manifest.counts,
        "settings": manifest.settings,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "images": totals.images,
        "images_with_original_bytes": totals.kept_images,
        "quarantine_reasons": dict(totals.reasons.most_common(_MOST_REASONS)),
        "histograms": {
            name: {"lower_borders": list(BINS[name]), "rows": counts.tolist()}
            for name, counts in totals.histograms.items()
        },
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    storage.write_atomically(storage.join(output, REPORT_JSON), text.encode())
    storage.write_atomically(storage.join(output, REPORT_HTML), _page(content, manifest, _sample_rows(shards)).encode())


def _sample_rows(shards: ShardSet) -> list[SampleRow]:
    """Rows spread evenly over the set."""
    count = min(SAMPLE_IMAGES, len(shards))
    return shards.rows(sorted({int(row) for row in np.linspace(0, len(shards) - 1, count)})) if count else []


_TILES: tuple[Literal["rows_in", "rows_out", "duplicates", "filtered", "quarantined"], ...] = (
    "rows_in",
    "rows_out",
    "duplicates",
    "filtered",
    "quarantined",
)


def _page(content: ReportContent, manifest: Manifest, rows: Sequence[SampleRow]) -> str:
    counts = content["counts"]
    tiles = [(key.replace("_", " "), counts[key]) for key in _TILES]
    tiles += [("near-duplicates (kept)", counts["near_duplicates"]), ("shards", content["shards"])]
    histograms = "".join(
        _histogram(TITLES[name], BINS[name], content["histograms"][name]["rows"])
        for name in BINS
        if sum(content["histograms"][name]["rows"])
    )
    return _PAGE.substitute(
        source=html.escape(manifest.source),
        tiles="".join(f"<div class=tile><b>{value:,}</b><span>{name}</span></div>" for name, value in tiles),
        filters=_table(("filter", "rows removed"), counts["filters"].items()) or "<p>No filter removed a row.</p>",
        reasons=_table(("reason", "samples"), content["quarantine_reasons"].items()) or "<p>Nothing was set apart.</p>",
        changes=_table(("change", "rows"), counts["changes"].items()) or "<p>No text or box was changed.</p>",
        histograms=histograms,
        samples="".join(_sample(row) for row in rows),
        settings=_table(("setting", "value"), manifest.settings.items()),
    )


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    body = "".join(f"<tr><td>{html.escape(str(a))}</td><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f"<table><tr><th>{head[0]}</th><th>{head[1]}</th></tr>{body}</table>" if body else ""


def _histogram(title: str, borders: Sequence[float], counts: Sequence[int]) -> str:
    """Bars as SVG, each with its range and count as a tooltip; empty bins at both ends are left out."""
    filled = [number for number, count in enumerate(counts) if count]
    shown = range(filled[0], filled[-1] + 1)
    width, height, room = 420, 120, 420 / max(6, len(shown))
    bars = []
    for number in shown:
        low, count = borders[number], counts[number]
        high = f"{borders[number + 1]:g}" if number + 1 < len(borders) else "more"
        tall = height * count / max(counts)
        x = (number - shown[0]) * room
        bars.append(
            f"<g><title>{low:g} to {high}: {count:,}</title>"
            f'<rect x="{x + 1:.1f}" y="{height - tall:.1f}" width="{room - 2:.1f}" height="{tall:.1f}" rx="2"/>'
            f'<text x="{x + room / 2:.1f}" y="{height + 13}">{low:g}</text></g>'
        )
    drawing = f'<svg viewBox="0 0 {width} {height + 18}">{"".join(bars)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"


def _sample(row: SampleRow) -> str:
    turn = row.turns[0]
    words = " - ".join(part for part in (turn.question, turn.answers[0]) if part)
    words = words if len(words) <= 160 else words[:157] + "..."
    shown = "<div class=noimage>text only</div>"
    if row.image is not None:
        data = base64.b64encode(_thumbnail(row.image)).decode()
        shown = f'<img src="data:image/jpeg;base64,{data}" alt="">'
    caption = f"{html.escape(words)}<i>{html.escape(row.id)}</i>"
    return f"<figure class=sample>{shown}<figcaption>{caption}</figcaption></figure>"


def _thumbnail(image: bytes) -> bytes:
    """A JPEG of at most ``_THUMBNAIL_SIDE``, a third of the time that PIL takes."""
    pixels = np.asarray(open_image(image))
    height, width = pixels.shape[:2]
    scale = min(1.0, _THUMBNAIL_SIDE / max(width, height))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return bytes(simplejpeg.encode_jpeg(small, 80, "RGB", "420"))


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$source: prepared data</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --soft: #66758a; --line: #dde3ea; --page: #fbfcfd; --bar: #3f7fd6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #93a1b3; --line: #2c3744; --page: #131a22; --bar: #6fa5ee; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .5rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.tiles, .charts, .samples { display: grid; gap: .8rem; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: var(--soft); font-size: .85rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.samples { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); align-items: start; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 10px; padding: .7rem; }
figcaption { font-size: .85rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.sample figcaption { margin: .4rem 0 0; } .sample i { display: block; color: var(--soft); font-size: .75rem; }
.sample img { width: 100%; border-radius: 6px; display: block; }
.noimage { color: var(--soft); padding: 2rem 0; text-align: center; }
svg { width: 100%; } rect { fill: var(--bar); } text { font-size: 11px; fill: var(--soft); text-anchor: middle; }
table { border-collapse: collapse; }
td, th { text-align: left; padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); }
</style></head><body>
<h1>$source</h1>
<div class="tiles">$tiles</div>
<h2>Samples</h2><div class="samples">$samples</div>
<h2>Distributions</h2><div class="charts">$histograms</div>
<h2>Filters</h2>$filters
<h2>Quarantine</h2>$reasons
<h2>Changes</h2>$changes
<h2>Settings</h2>$settings
</body></html>
""")
