"""Every published data set's files in small, an entry or two each, as their publishers lay them out."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.fetch.addresses import published_address
from pipelines.fetch.datasets import all_sets
from tests.source_files import jpeg, write_web_tar

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

LINKS = [{"caption": f"picture number {n}", "url": f"http://images.invalid/{n}.jpg"} for n in range(4)]

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
    "TextCaps_0.1_train.json": {
        "data": [
            {
                "image_id": "0054c91397f2fe05",
                "caption_str": "A star.",
                "flickr_300k_url": "https://photos.invalid/gone_o.jpg",
                "flickr_original_url": "https://photos.invalid/2930_o.jpg",
            }
        ]
    },
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
            "imageURL": "http://books.invalid/images/a.jpg",
            "questions": ["Who wrote it?", "What is it?"],
            "answers": ["A", "B"],
            "split": 1,
        }
    },
    "000000000.json": {"caption": "A star.", "key": "000000000"},
    "laion_synthetic_filtered_large.json": LINKS,
    "ccs_synthetic_filtered_large.json": LINKS,
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


ZIPPED = {
    "train2014.zip": ["train2014/COCO_train2014_000000000009.jpg"],
    "refcoco.zip": ["refcoco/refs(unc).p", "refcoco/instances.json"],
    "refcoco+.zip": ["refcoco+/refs(unc).p", "refcoco+/instances.json"],
    "refcocog.zip": ["refcocog/refs(umd).p", "refcocog/instances.json"],
    "vg/images.zip": ["VG_100K/1.jpg"],
    "images2.zip": ["VG_100K_2/2.jpg"],
    "region_descriptions.json.zip": ["region_descriptions.json"],
    "image_data.json.zip": ["image_data.json"],
    "train_val_images.zip": ["train_images/0054c91397f2fe05.jpg"],
    "gqa/images.zip": ["images/2405722.jpg"],
}
"""What the publishers' archives hold."""

BY_HAND = (
    "cc_sbu_align/filter_cap.json",
    "cc_sbu_align/image/2.jpg",
    "multitask_conversation/multitask_conversation.json",
    "unnatural_instructions/filtered_unnatural_instruction.json",
    "flickr30k/groundedcaption.json",
    "flickr30k/captiontobbox.json",
    "flickr30k/phrasetobbox.json",
    "flickr30k/flickr30k-images/1000092795.jpg",
    "ocrvqa/dataset.json",
    "ocrvqa/images/1421539896.jpg",
)
"""What a person has to fetch, below the folder of raw data."""


def publish_data(server, folder: Path) -> None:
    """Put every file of the paper's data sets on a ``FileServer``, at its published address."""
    for each in all_sets().values():
        for file in each.files:
            names = ZIPPED.get(file.path.rsplit("/", 1)[1], ZIPPED.get(file.path))
            path = folder / each.name / file.path.rsplit("/", 1)[1]
            if names is None:
                build(path if each.name != "gqa" else folder / "lavis" / path.name)
                content = (path if each.name != "gqa" else folder / "lavis" / path.name).read_bytes()
            else:
                buffer = io.BytesIO()
                with zipfile.ZipFile(buffer, "w") as archive:
                    for name in names:
                        build(folder / each.name / name)
                        archive.write(folder / each.name / name, name)
                content = buffer.getvalue()
            server.files[urlsplit(published_address(file)).path] = content


SINGLE_IMAGES = (
    "/train2014/COCO_train2014_000000000009.jpg",
    "/people/rak248/VG_100K_2/2.jpg",
    "/people/rak248/VG_100K_2/2405722.jpg",
    "/2930_o.jpg",
    "/images/a.jpg",
)
"""Paths of the addresses of single images that the entries name."""


def publish_images(server) -> None:
    """Put the single images on a ``FileServer``."""
    for number, path in enumerate(SINGLE_IMAGES):
        server.files[path] = jpeg(number, (96, 64))
