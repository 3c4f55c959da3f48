"""Inputs with a known fate, and settings of ingests that take a second, for tests."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.settings import PrepareDataSettings
from tests.source_files import encode, jpeg, picture, sample, write_tar

TIMELESS = ("manifest.json", "quarantine.jsonl", "removed.jsonl", "near_duplicates.jsonl", "report.json", "report.html")


def settings(folder, output="out", **changes):
    place = output if "://" in output else str(folder / output)
    known = {"source": "laion", "input": str(folder / "*.tar"), "output": place, "quiet": True, "num_workers": 0}
    return PrepareDataSettings(**{**known, "tracking_uri": "none", **changes})


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder) -> dict[str, bytes]:
    """Every file that must not depend on the way to it."""
    names = [path.name for path in Path(folder).glob("*.arrow")]
    return {name: Path(folder, name).read_bytes() for name in sorted(names) + list(TIMELESS)}


def write_messy_tars(folder):
    """Three tars with a known fate for each of their samples."""
    first = [
        *sample("a0", jpeg(0), "a red bus"),
        *sample("a1", jpeg(1), "a cat"),
        *sample("a2", b"junk", "broken"),
        *sample("tiny", jpeg(2, (4, 4)), "tiny"),
    ]
    same_picture = [*sample("b0", jpeg(0), "a red bus"), *sample("b1", jpeg(0), "another caption")]
    near = sample("b2", encode(picture(1, (96, 64)), quality=70), "a cat, larger")
    third = [
        *sample("c0", jpeg(5, (600, 500)), "large"),
        *sample("c1", jpeg(6), "$$$$$$$"),
        *sample("c2", jpeg(7), "last"),
    ]
    write_tar(folder / "00000.tar", first)
    write_tar(folder / "00001.tar", [*same_picture, *near])
    write_tar(folder / "00002.tar", third)
