"""Every benchmark's files as they are distributed, a few entries each, with images of a few pixels."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from tests.serving_model import make_image


def put(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def picture(path: Path, seed: int = 0) -> Path:
    return put(path, make_image(seed, kind="PNG" if path.suffix == ".png" else "JPEG"))


def vqav2(root: Path) -> None:
    questions = [{"image_id": 42, "question": f"what colour {i}?", "question_id": 42000 + i} for i in range(2)]
    annotations = [
        {
            "image_id": 42,
            "question_id": 42000 + i,
            "question_type": "what",
            "answer_type": ["other", "yes/no"][i],
            "multiple_choice_answer": "red",
            "answers": [{"answer": "red", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)],
        }
        for i in range(2)
    ]
    put(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    put(root / "v2_mscoco_val2014_annotations.json", {"annotations": annotations[::-1]})
    picture(root / "val2014/COCO_val2014_000000000042.jpg")


def vqav2_as_lavis_has_it(root: Path) -> None:
    """One list of questions with their answers, each with the path of its image."""
    entry = {"image": "val2014/COCO_val2014_000000000042.jpg", "dataset": "vqa", "answer": ["red"] * 9 + ["blue"]}
    put(root / "vqa_val.json", [{**entry, "question_id": 42000 + i, "question": f"what {i}?"} for i in range(2)])
    picture(root / "val2014/COCO_val2014_000000000042.jpg")


def okvqa(root: Path, ending: str = "") -> None:
    """``ending`` is ``_clean`` in the files of the MiniGPT-v2 evaluation."""
    put(
        root / f"OpenEnded_mscoco_val2014_questions{ending}.json",
        {"questions": [{"image_id": 7, "question": "what sport?", "question_id": 71}]},
    )
    answers = [{"answer": "race", "raw_answer": "racing", "answer_id": n} for n in range(10)]
    put(
        root / f"mscoco_val2014_annotations{ending}.json",
        {"annotations": [{"image_id": 7, "question_id": 71, "answer_type": "other", "answers": answers}]},
    )
    picture(root / "val2014/COCO_val2014_000000000007.jpg")


def aokvqa(root: Path) -> None:
    entry = {
        "image_id": 461751,
        "question": "what is it?",
        "choices": ["a", "b", "c", "d"],
        "correct_choice_idx": 2,
        "direct_answers": ["c"] * 8 + ["b"] * 2,
        "rationales": [],
    }
    hard = {**entry, "question_id": "hard", "difficult_direct_answer": True}
    put(root / "aokvqa_v1p0_val.json", [{**entry, "question_id": "easy", "difficult_direct_answer": False}, hard])
    picture(root / "val2017/000000461751.jpg")


def aokvqa_as_lavis_has_it(root: Path) -> None:
    """The same file name; the path of an image in place of its number."""
    entry = {
        "image": "val2014/COCO_val2014_000000461751.jpg",
        "question_id": "easy",
        "question": "what is it?",
        "choices": ["a", "b", "c", "d"],
        "correct_choice_idx": 2,
        "direct_answers": ["c"] * 10,
        "dataset": "aokvqa",
    }
    put(root / "aokvqa_v1p0_val.json", [entry])
    picture(root / "val2014/COCO_val2014_000000461751.jpg")


def vizwiz(root: Path) -> None:
    entry = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "Can you tell me what this is?",
        "answers": [{"answer_confidence": "yes", "answer": "basil"}] * 10,
        "answer_type": "other",
        "answerable": 1,
    }
    put(root / "Annotations/val.json", [entry])
    picture(root / "val/VizWiz_val_00000000.jpg")


def gqa(root: Path) -> None:
    entry = {
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "isBalanced": True,
        "types": {"structural": "verify", "semantic": "global", "detailed": "weatherVerify"},
    }
    put(root / "questions1.2/testdev_balanced_questions.json", {"201307251": entry})
    picture(root / "images/n161313.jpg")


def gqa_as_released(root: Path) -> None:
    put(root / "testdev_balanced_questions.json", [{"image": "n1.jpg", "question": "Is it?", "answer": "yes"}])
    picture(root / "gqa/images/n1.jpg")


def iconqa(root: Path) -> None:
    problem = {
        "question": "How many?",
        "choices": ["one", "two", "three"],
        "answer": 1,
        "ques_type": "choose_txt",
        "split": "val",
    }
    other = {"question": "Which?", "choices": ["a.png"], "answer": 0, "ques_type": "choose_img", "split": "val"}
    put(root / "iconqa_data/problems.json", {"10001": problem, "10002": other})
    put(root / "iconqa_data/pid_splits.json", {"choose_txt_val": ["10001"], "choose_img_val": ["10002"]})
    picture(root / "iconqa_data/iconqa/val/choose_txt/10001/image.png")


def iconqa_as_released(root: Path) -> None:
    entry = {"image_id": "10001", "question": "How many?", "choices": ["one", "two"], "answer": 1}
    put(root / "choose_text_val.json", [entry])
    picture(root / "choose_txt/10001/image.png")


def vsr(root: Path) -> None:
    entries = [
        {"image": "000000000001.jpg", "caption": "The cat is left of the dog.", "label": 1, "relation": "left of"},
        {"image": "000000000002.jpg", "caption": "The cat is under the dog.", "label": 0, "relation": "under"},
    ]
    put(root / "zeroshot/test.jsonl", lines(entries))
    picture(root / "train2017/000000000001.jpg")
    picture(root / "val2017/000000000002.jpg", 1)


def pope(root: Path) -> None:
    for kind in ("random", "popular", "adversarial"):
        entries = [
            {
                "question_id": i,
                "image": "COCO_val2014_000000000042.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": ["yes", "no"][i],
            }
            for i, thing in enumerate(("bowl", "cake"))
        ]
        put(root / f"output/coco/coco_pope_{kind}.json", lines(entries))
    picture(root / "val2014/COCO_val2014_000000000042.jpg")


def hateful_memes(root: Path) -> None:
    entries = [{"id": 8291, "img": "img/08291.png", "label": 1, "text": "words"}]
    entries.append({"id": 46971, "img": "img/46971.png", "label": 0, "text": "other words"})
    put(root / "dev.jsonl", lines(entries))
    picture(root / "img/08291.png")
    picture(root / "img/46971.png", 1)


def refcoco_as_published(root: Path) -> None:
    """refs(unc).p and instances.json of RefCOCO and RefCOCO+; ``refs(umd).p`` of RefCOCOg."""
    for folder, partition, splits in (
        ("refcoco", "unc", ("train", "val", "testA", "testB")),
        ("refcoco+", "unc", ("train", "val", "testA", "testB")),
        ("refcocog", "umd", ("train", "val", "test")),
    ):
        refs = [
            {
                "ref_id": n,
                "ann_id": 100 + n,
                "image_id": 581857,
                "split": split,
                "sentences": [
                    {"sent_id": 10 * n + s, "sent": f"{folder} {split} {s}", "raw": "RAW"} for s in range(1 + n % 2)
                ],
            }
            for n, split in enumerate(splits)
        ]
        put(root / f"{folder}/refs({partition}).p", pickle.dumps(refs, protocol=2))
        boxes = [{"id": 100 + n, "bbox": [10.0 * n, 5.0, 20.0, 10.0]} for n in range(len(splits))]
        images = [{"id": 581857, "width": 60, "height": 40, "file_name": "COCO_train2014_000000581857.jpg"}]
        put(root / f"{folder}/instances.json", {"annotations": boxes, "images": images})
    picture(root / "train2014/COCO_train2014_000000581857.jpg")


def refcoco_as_lists(root: Path) -> None:
    """The lists of the MiniGPT-v2 evaluation."""
    for folder, splits in (("refcoco", ("val", "testA", "testB")), ("refcocog", ("val", "test"))):
        for split in splits:
            entries = [
                {
                    "img_id": "COCO_train2014_000000581857_16",
                    "sents": f"{folder} {split}",
                    "bbox": [6.0, 4.0, 12.0, 8.0],
                    "height": 40,
                    "width": 60,
                }
            ]
            put(root / f"{folder}/{folder}_{split}.json", entries)
    picture(root / "train2014/COCO_train2014_000000581857.jpg")
