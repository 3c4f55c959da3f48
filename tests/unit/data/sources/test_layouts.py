"""Every layout of docs/datasets.md, built in small, and the command beside it."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.ingest.job import ingest
from pipelines.data.shards import ShardSet
from pipelines.data.sources import SOURCES
from pipelines.settings import PrepareDataSettings
from tests.paths import ROOT
from tests.source_files import jpeg, write_web_tar

TEXT = (ROOT / "docs/datasets.md").read_text()
TRAINING = TEXT[TEXT.index("## Training sets") :].split("\n## ")[0]
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", TRAINING, re.MULTILINE | re.DOTALL))

TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A star."}]
COCO_IMAGE = "train2014/COCO_train2014_000000000009.jpg"
REF = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "train", "sentences": [{"raw": "the star"}]}
QUESTIONS = {
    "info": {},
    "data_subtype": "train2014",
    "questions": [{"question_id": 1, "image_id": 9, "question": "What?"}],
}
ANSWERS = {"annotations": [{"question_id": 1, "image_id": 9, "answers": [{"answer": "star"}, {"answer": "a star"}]}]}
UNNATURAL = {"instances": [{"instruction_with_input": "Say it.", "constraints": None, "output": "It."}]}
REGION = {"region_id": 7, "image_id": 2, "phrase": "a star", "x": 1, "y": 2, "width": 20, "height": 10}

JSON = {
    "filter_cap.json": {"annotations": [{"image_id": "2", "caption": "A star."}]},
    "conversation_58k.json": [{"id": "000000000009", "conversations": TALK}],
    "detail_23k.json": [{"id": "000000000009", "conversations": TALK}],
    "complex_reasoning_77k.json": [{"id": "000000000009", "conversations": TALK}],
    "multitask_conversation.json": [{"id": "000000000009", "conversations": TALK}],
    "filtered_unnatural_instruction.json": [UNNATURAL],
    "instances.json": {"images": [{"id": 9}], "annotations": [{"id": 5, "bbox": [1, 2, 20, 10]}]},
    "region_descriptions.json": [{"id": 2, "regions": [REGION]}],
    "image_data.json": [{"image_id": 2, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/2.jpg"}],
    "groundedcaption.json": [{"image_id": "1000092795", "grounded_caption": "<p>a star</p> {<1><2><30><40>}"}],
    "captiontobbox.json": [{"image_id": "1000092795", "caption": "a star", "output": "<p>a star</p> {<1><2><30><40>}"}],
    "phrasetobbox.json": [{"image_id": "1000092795", "phrase": "a star", "bbox": "{<1><2><30><40>}"}],
    "coco_karpathy_train.json": [{"image": COCO_IMAGE, "caption": "A star.", "image_id": "coco_9"}],
    "captions_train2014.json": {"images": [{"id": 9}], "annotations": [{"image_id": 9, "id": 1, "caption": "A star."}]},
    "TextCaps_0.1_train.json": {"data": [{"image_id": "0054c91397f2fe05", "caption_str": "A star."}]},
    "vqa_train.json": [{"image": COCO_IMAGE, "question": "What?", "question_id": 1, "answer": ["star", "a star"]}],
    "okvqa_train.json": [{"image": COCO_IMAGE, "question": "What?", "question_id": 1, "answer": ["star", "a star"]}],
    "v2_OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
    "v2_mscoco_train2014_annotations.json": ANSWERS,
    "OpenEnded_mscoco_train2014_questions.json": QUESTIONS,
    "mscoco_train2014_annotations.json": ANSWERS,
    "aokvqa_v1p0_train.json": [
        {"split": "train", "image_id": 9, "question": "What?", "direct_answers": ["star"], "choices": ["star", "moon"]}
    ],
    "lavis/train_balanced_questions.json": [{"image": "2405722.jpg", "question": "What?", "answer": "star"}],
    "questions1.2/train_balanced_questions.json": {
        "05515938": {"imageId": "2405722", "question": "?", "answer": "star"}
    },
    "dataset.json": {
        "1421539896": {
            "imageURL": "http://x/a.jpg",
            "questions": ["Who wrote it?", "What is it?"],
            "answers": ["A", "B"],
            "split": 1,
        }
    },
    "000000000.json": {"caption": "A star.", "key": "000000000"},
}


def build(path: Path) -> None:
    """One file of a layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = JSON.get(path.name, JSON.get(f"{path.parent.name}/{path.name}"))
    if content is not None:
        path.write_text(json.dumps(content))
    elif path.suffix == ".jpg":
        path.write_bytes(jpeg(len(path.name), (96, 64)))
    elif path.suffix == ".p":
        path.write_bytes(pickle.dumps([REF, {**REF, "ref_id": 2, "split": "val"}], protocol=2))
    elif path.suffix == ".tar":
        write_web_tar(path, int(path.stem) * 2, 2)
    elif path.name.endswith(".tar.gz"):
        path.write_bytes(gzip.compress(write_web_tar(path.with_suffix(""), 0, 2).read_bytes()))
        path.with_suffix("").unlink()
    elif path.name == "full_data.jsonl":
        path.write_text(json.dumps(UNNATURAL) + "\n")
    elif path.name == "own.jsonl":
        path.write_text(json.dumps({"image": "cat.jpg", "question": "What is it?", "answer": "A cat."}) + "\n")
    elif path.name == "own.csv":
        path.write_text("image,question,answer\ncat.jpg,What is it?,A cat.\n")
    elif path.suffix == ".txt":
        path.write_text("A star.")
    elif path.suffix == ".parquet":
        row = {"jpg": jpeg(1), "caption": path.name, "url": "u", "status": "success"}
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        raise AssertionError(f"no content for {path.name}")


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
