"""The files of each data set: names, folders and wrapping, as the real sets are distributed.

A set's *input* is what its reader is given: an annotation file, a folder or a glob. Sets whose images come from COCO's
2014 training images share one image folder, as in reality.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tinygptv.miniature.entries import DESCRIBE, Describe, Entry, coco_name, vg_folder
from tinygptv.miniature.scenes import Scene
from tinygptv.miniature.shapes import SHAPES

Save = Callable[[Path, list[Entry]], None]


@dataclass(frozen=True)
class SourceFormat:
    """One data set on disk; paths are relative to the world's folder.

    Attributes:
        input: what its reader is given.
        describe: entries of one scene.
        save: writes all entries, given the world's folder; None for tar shards, which hold their captions themselves.
        image_folder: key of ``IMAGE_PATHS``; None for text only and for tar shards.
        images: image folder that its reader is given; None where ``input`` leads to it.
        every: a world uses every n-th training scene for this set.
    """

    input: str
    describe: Describe
    save: Save | None
    image_folder: str | None = None
    images: str | None = None
    every: int = 1


IMAGE_PATHS: dict[str, Callable[[Scene], str]] = {
    "coco": lambda scene: f"train2014/{coco_name(scene)}",
    "coco2017": lambda scene: f"train2017/{scene.number:012d}.jpg",
    "align": lambda scene: f"cc_sbu_align/image/{scene.number}.jpg",
    "gqa": lambda scene: f"gqa/images/{scene.number}.jpg",
    "flickr": lambda scene: f"flickr30k/flickr30k-images/{scene.number}.jpg",
    "textcaps": lambda scene: f"textcaps/train_images/{scene.number:016x}.jpg",
    "visual_genome": lambda scene: f"visual_genome/{vg_folder(scene)}/{scene.number}.jpg",
    "ocrvqa": lambda scene: f"ocrvqa/images/{scene.number}.jpg",
}
"""Path of a scene's image for the sets that share a folder; relative to the world's folder."""


def add_web_sample(tar: tarfile.TarFile, key: str, sample: Entry, jpeg: bytes) -> None:
    """Append key.jpg, key.txt and key.json to an img2dataset shard; the same bytes for the same sample."""
    fields = json.dumps({**sample, "key": key}).encode()
    for suffix, data in (("jpg", jpeg), ("txt", str(sample["caption"]).encode()), ("json", fields)):
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def write_json(path: Path, content: Any) -> None:
    """Write compact JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _save_json(path: str, wrap: Callable[[list[Entry]], Any] = lambda entries: entries) -> Save:
    def save(root: Path, entries: list[Entry]) -> None:
        write_json(root / path, wrap(entries))

    return save


def _save_refs(folder: str, partition: str) -> Save:
    """``refs(unc).p`` (a pickled list, protocol 2) and ``instances.json``, as RefCOCO's authors distribute them."""

    def save(root: Path, entries: list[Entry]) -> None:
        target = root / folder
        images = {str(entry["image"]): entry["image"] for entry in entries}  # each once
        instances = {
            "images": list(images.values()),
            "annotations": [entry["annotation"] for entry in entries],
            "categories": [{"id": n, "name": shape} for n, shape in enumerate(SHAPES, start=1)],
        }
        write_json(target / "instances.json", instances)
        # A pickle records which strings are one object, and that depends on the worker they came from; JSON forgets it.
        refs = json.loads(json.dumps([entry["ref"] for entry in entries]))
        (target / f"refs({partition}).p").write_bytes(pickle.dumps(refs, protocol=2))

    return save


def _save_regions(root: Path, entries: list[Entry]) -> None:
    write_json(root / "visual_genome/region_descriptions.json", [entry["regions"] for entry in entries])
    write_json(root / "visual_genome/image_data.json", [entry["image"] for entry in entries])


def _save_textcaps(root: Path, entries: list[Entry]) -> None:
    header = {"dataset_type": "train", "dataset_name": "textcaps", "dataset_version": "0.1"}
    write_json(root / "textcaps/TextCaps_0.1_train.json", {**header, "data": entries})


def _save_vqa(root: Path, entries: list[Entry]) -> None:
    """Both files of VQA v2, as both are trained on; every tenth image's questions count as validation."""
    validation = [cast(int, entry["question_id"]) // 10 % 10 == 0 for entry in entries]
    for name, wanted in (("train", False), ("val", True)):
        chosen = [entry for entry, held in zip(entries, validation, strict=True) if held == wanted]
        write_json(root / f"coco_vqa/vqa_{name}.json", chosen)


def _by_key(entries: list[Entry]) -> dict[str, Entry]:
    return {str(entry["key"]): {name: value for name, value in entry.items() if name != "key"} for entry in entries}


def _file(name: str, path: str, folder: str, images: str, *, every: int = 1, **saver: Any) -> SourceFormat:
    """A set of one annotation file and an image folder."""
    return SourceFormat(path, DESCRIBE[name], saver.get("save", _save_json(path)), folder, images, every)


def _coco(name: str, path: str, **options: Any) -> SourceFormat:
    return _file(name, path, "coco", "train2014", **options)


def _flickr(name: str, file: str) -> SourceFormat:
    return _file(name, f"flickr30k/{file}", "flickr", "flickr30k/flickr30k-images", every=2)


def _referring(name: str, folder: str, partition: str, every: int) -> SourceFormat:
    return _coco(name, folder, save=_save_refs(folder, partition), every=every)


_ALIGN = "cc_sbu_align/filter_cap.json"
_UNNATURAL = "unnatural_instruction/filtered_unnatural_instruction.json"
_MULTITASK = "multitask_conversation/multitask_conversation.json"
_TEXTCAPS = "textcaps/TextCaps_0.1_train.json"
_GQA = "gqa/train_balanced_questions.json"
_OCRVQA = "ocrvqa/dataset.json"

SOURCE_FORMATS: dict[str, SourceFormat] = {
    "laion": SourceFormat("laion/*.tar", DESCRIBE["laion"], None),
    "cc_sbu": SourceFormat("cc_sbu/*.tar", DESCRIBE["cc_sbu"], None, every=8),
    "cc_sbu_align": SourceFormat(
        "cc_sbu_align",
        DESCRIBE["cc_sbu_align"],
        _save_json(_ALIGN, lambda entries: {"annotations": entries}),
        "align",
        every=4,
    ),
    "llava_conversation": _coco("llava_conversation", "llava/conversation_58k.json", every=2),
    "llava_detail": _coco("llava_detail", "llava/detail_23k.json", every=4),
    "llava_reason": _coco("llava_reason", "llava/complex_reasoning_77k.json", every=2),
    "multitask_conversation": _coco("multitask_conversation", _MULTITASK, every=4),
    "unnatural_instruction": SourceFormat(
        _UNNATURAL, DESCRIBE["unnatural_instruction"], _save_json(_UNNATURAL), every=4
    ),
    "refcoco": _referring("refcoco", "refs/refcoco", "unc", 1),
    "refcocop": _referring("refcocop", "refs/refcoco+", "unc", 2),
    "refcocog": _referring("refcocog", "refs/refcocog", "umd", 2),
    "refvg": SourceFormat("visual_genome", DESCRIBE["refvg"], _save_regions, "visual_genome", every=4),
    "flickr_grounded_caption": _flickr("flickr_grounded_caption", "groundedcaption.json"),
    "flickr_CaptionToPhrase": _flickr("flickr_CaptionToPhrase", "captiontobbox.json"),
    "flickr_ObjectToPhrase": _flickr("flickr_ObjectToPhrase", "phrasetobbox.json"),
    "coco_caption": _coco("coco_caption", "coco_caption/coco_karpathy_train.json", every=2),
    "textcaps_caption": _file(
        "textcaps_caption", _TEXTCAPS, "textcaps", "textcaps/train_images", every=4, save=_save_textcaps
    ),
    "coco_vqa": _coco("coco_vqa", "coco_vqa/vqa_*.json", save=_save_vqa),
    "ok_vqa": _coco("ok_vqa", "ok_vqa/okvqa_train.json", every=4),
    "aok_vqa": _file("aok_vqa", "aok_vqa/aokvqa_v1p0_train.json", "coco2017", "train2017", every=4),
    "gqa": _file("gqa", _GQA, "gqa", "gqa/images", every=2),
    "ocrvqa": _file("ocrvqa", _OCRVQA, "ocrvqa", "ocrvqa/images", every=8, save=_save_json(_OCRVQA, _by_key)),
}
"""Data set name -> its files."""

INVERSE = {"invrefcoco": "refcoco", "invrefcocop": "refcocop", "invrefcocog": "refcocog"}
"""Data sets that read another one's files."""
