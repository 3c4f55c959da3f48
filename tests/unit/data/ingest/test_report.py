"""The report's page shows the counts that it was given."""

from __future__ import annotations

import re

from pipelines.data.ingest import report


def test_bars_have_their_bins_counts_and_heights():
    drawing = report._histogram("Words", (0, 1, 2, 5, 10), [0, 2, 0, 8, 0])
    titles = re.findall(r"<title>(.*?)</title>", drawing)
    assert titles == ["1 to 2: 2", "2 to 5: 0", "5 to 10: 8"], "empty bins at both ends are left out"
    heights = [float(height) for height in re.findall(r' height="([\d.]+)" rx', drawing)]
    assert heights == [30, 0, 120]
    assert "<figcaption>Words</figcaption>" in drawing


def test_the_last_bin_is_open():
    drawing = report._histogram("Words", (0, 1), [0, 1200])
    assert re.findall(r"<title>(.*?)</title>", drawing) == ["1 to more: 1,200"]
