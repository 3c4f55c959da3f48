"""Every layout of docs/datasets.md, built in small, and the command beside it."""

from __future__ import annotations

import re

import pytest

from pipelines.data.ingest.job import ingest
from pipelines.data.shards import ShardSet
from pipelines.data.sources import SOURCES
from pipelines.settings import PrepareDataSettings
from tests.dataset_files import build
from tests.paths import ROOT

TEXT = (ROOT / "docs/datasets.md").read_text()
TRAINING = TEXT[TEXT.index("## Training sets") :].split("\n## ")[0]
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TRAINING, re.MULTILINE | re.DOTALL))


def commands(section: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("python jobs/prepare_data.py").split() for line in lines]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_layout_is_read_by_the_command_beside_it(tmp_path, name):
    section = SECTIONS[name]
    for block in re.findall(r"```text\n(.*?)```", section, re.DOTALL):
        for line in block.splitlines():
            build(tmp_path / line.removeprefix("DATA/"))
    assert commands(section)
    for written in commands(section):
        words = [word.replace("DATA", str(tmp_path)).replace("OUT", str(tmp_path / "out")) for word in written]
        result = ingest(PrepareDataSettings.load(None, [*words, "num_workers=0", "tracking_uri=none", "quiet=true"]))
        assert result["rows_out"] > 0, words
        assert result["quarantined"] == 0, words
        rows = list(ShardSet.open(result["output"]))
        assert all(row.turns[0].answers for row in rows)
        assert all(row.image for row in rows) or "unnatural" in words[0]
        if "hub" in words[1]:
            assert [row.turns[0].answers for row in rows] == [("train-00000-of-00001.parquet",)]


def test_every_source_has_a_command():
    used = {
        word.removeprefix("source=")
        for section in SECTIONS.values()
        for words in commands(section)
        for word in words[:1]
    }
    assert used == set(SOURCES)


def test_every_training_set_is_in_the_table():
    rows = [line.split("|")[1] for line in TRAINING.splitlines() if line.startswith("| ")]
    named = {name.strip() for row in rows[1:] for name in row.split(",")}
    assert named == set(SOURCES) - {"webdataset", "jsonl", "csv", "hf", "parquet"}
