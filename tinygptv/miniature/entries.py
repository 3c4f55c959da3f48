"""What one scene gives to each data set: entries with the very fields of the real annotation files.

What a scene cannot give is documented at its function: there are no book covers here, so ``ocrvqa`` asks for the
caption; ``ok_vqa`` takes sums and opposites for outside knowledge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tinygptv.miniature import captions
from tinygptv.miniature.conversations import DETAIL_QUESTIONS, Turn, conversation, multitask_conversation, reasoning
from tinygptv.miniature.instructions import text_instruction
from tinygptv.miniature.questions import KINDS, questions
from tinygptv.miniature.referring import KINDS as REFERRING_KINDS
from tinygptv.miniature.referring import expressions, refer_to
from tinygptv.miniature.scenes import SIZES, Scene, pick
from tinygptv.miniature.shapes import SHAPES, outline
from tinygptv.miniature.words import VALUES, article, count_of, full_name, plural

Entry = dict[str, object]
"""An annotation of a data set; fields as its publishers have them."""

Describe = Callable[[Scene, np.random.Generator], list[Entry]]

_SENTENCES = 3
_REFERRED = 2
_ANSWERS = 10
_GQA_KINDS = (*KINDS, "relation", "relation", "comparison")


def coco_name(scene: Scene) -> str:
    """``COCO_train2014_000000000001.jpg``."""
    return f"COCO_train2014_{scene.number:012d}.jpg"


def vg_folder(scene: Scene) -> str:
    """The one of Visual Genome's two image folders that holds the scene."""
    return "VG_100K" if scene.key.index % 2 else "VG_100K_2"


def bbox_xywh(scene: Scene, index: int) -> list[float]:
    """COCO's box of an object: x, y, width, height in pixels, to a hundredth."""
    x1, y1, x2, y2 = scene.pixel_box(scene.objects[index])
    return [round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)]


def _web(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    """The .json member of an img2dataset shard; the shard's writer adds its key."""
    return [
        {
            "caption": captions.web_caption(scene, rng),
            "url": f"https://miniature.invalid/{scene.split}/{scene.number}.jpg",
            "key": "",
            "status": "success",
            "error_message": None,
            "width": scene.width,
            "height": scene.height,
            "original_width": scene.width,
            "original_height": scene.height,
            "exif": "{}",
        }
    ]


def _align(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    return [{"image_id": str(scene.number), "caption": captions.detailed_caption(scene, rng)}]


def _llava(turns_of: Callable[[Scene, np.random.Generator], Sequence[Turn]]) -> Describe:
    def describe(scene: Scene, rng: np.random.Generator) -> list[Entry]:
        said = []
        for index, turn in enumerate(turns_of(scene, rng)):
            question = turn.question
            if index == 0:
                question = f"{question}\n<image>" if rng.random() < 0.5 else f"<image>\n{question}"
            said += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
        image_id = f"{scene.number:012d}"
        return [{"id": image_id, "image": f"{image_id}.jpg", "conversations": said}]

    return describe


def _detail(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    return [Turn(pick(rng, DETAIL_QUESTIONS), captions.detailed_caption(scene, rng))]


def _grounded(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    return [{"image_id": str(scene.number), "grounded_caption": captions.grounded_caption(scene, rng)}]


def _caption_to_phrase(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    caption, output = captions.caption_phrases(scene, rng)
    return [{"image_id": str(scene.number), "caption": caption, "output": output}]


def _object_to_phrase(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    phrase, boxes = captions.phrase_boxes(scene, rng)
    return [{"image_id": str(scene.number), "phrase": phrase, "bbox": boxes}]


def _unnatural(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    drawn = text_instruction(rng)
    instance = {
        "instruction_with_input": drawn.instruction,
        "input": "",
        "constraints": drawn.constraint,
        "output": drawn.output,
    }
    return [{"instruction": drawn.instruction, "instances": [instance]}]


def _refs(kinds: Sequence[str], the: float) -> Describe:
    """Referred objects of a scene. ``the``: share of sentences that begin with the article."""

    def describe(scene: Scene, rng: np.random.Generator) -> list[Entry]:
        entries: list[Entry] = []
        for index in (int(i) for i in rng.permutation(len(scene.objects))[:_REFERRED]):
            found = expressions(scene.objects, index, rng, kinds=kinds)
            texts = [expression.text for expression, _ in zip(found, range(_SENTENCES), strict=False)]
            if texts:
                said = [f"the {text}" if rng.random() < the else text for text in texts]
                entries.append(
                    {"ref": _ref(scene, index, said), "annotation": _annotation(scene, index), "image": _image(scene)}
                )
        return entries

    return describe


def _ref(scene: Scene, index: int, texts: Sequence[str]) -> Entry:
    ref_id = scene.number * 10 + index
    sentences = [
        {"sent_id": ref_id * 10 + n, "raw": text, "sent": text, "tokens": text.split()} for n, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ref_id,
        "image_id": scene.number,
        "category_id": SHAPES.index(scene.objects[index].shape) + 1,
        "split": "train",
        "file_name": f"COCO_train2014_{scene.number:012d}_{ref_id}.jpg",
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
    }


def _annotation(scene: Scene, index: int) -> Entry:
    item = scene.objects[index]
    x, y, w, h = bbox_xywh(scene, index)
    corners = outline(item.shape, item.angle)[0] * (w, h) + (x, y)
    return {
        "id": scene.number * 10 + index,
        "image_id": scene.number,
        "category_id": SHAPES.index(item.shape) + 1,
        "bbox": [x, y, w, h],
        "area": round(w * h, 2),
        "iscrowd": 0,
        "segmentation": [[round(float(number), 1) for number in corners.ravel()]],
    }


def _image(scene: Scene) -> Entry:
    return {"id": scene.number, "file_name": coco_name(scene), "width": scene.width, "height": scene.height}


def _regions(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    regions = []
    for index in range(len(scene.objects)):
        x, y, width, height = (round(side) for side in bbox_xywh(scene, index))
        phrase = refer_to(scene.objects, index, rng)
        regions.append(
            {
                "region_id": scene.number * 10 + index,
                "image_id": scene.number,
                "x": x,
                "y": y,
                "width": width,
                "height": height,
                "phrase": phrase,
            }
        )
    url = f"https://miniature.invalid/{vg_folder(scene)}/{scene.number}.jpg"
    image = {"image_id": scene.number, "url": url, "width": scene.width, "height": scene.height}
    return [
        {"regions": {"id": scene.number, "regions": regions}, "image": {**image, "coco_id": None, "flickr_id": None}}
    ]


def _coco_captions(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    image = f"train2014/{coco_name(scene)}"
    return [
        {"caption": captions.short_caption(scene, rng), "image": image, "image_id": f"coco_{scene.number}"}
        for _ in range(2)
    ]


def _textcaps(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    image_id = f"{scene.number:016x}"
    caption = captions.web_caption(scene, rng)
    return [
        {
            "image_id": image_id,
            "image_path": f"train/{image_id}.jpg",
            "caption_str": caption,
            "reference_strs": [caption],
            "caption_id": scene.number,
            "set_name": "train",
        }
    ]


def _vqa(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    asked = [(found.question, found.answer) for found in questions(scene, rng, 2)]
    return [_vqa_entry(scene, index, *pair) for index, pair in enumerate(asked)]


def _vqa_entry(scene: Scene, index: int, question: str, answer: str) -> Entry:
    return {
        "question_id": scene.number * 10 + index,
        "question": question,
        "answer": [answer] * _ANSWERS,
        "image": f"train2014/{coco_name(scene)}",
        "dataset": "vqa",
    }


def _ok_vqa(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    """Questions that the image alone does not answer: sums with a count, and opposites."""
    index, more = int(rng.integers(len(scene.objects))), int(rng.integers(1, 6))
    name = refer_to(scene.objects, index, rng, hide=("size",))
    shape = scene.objects[index].shape
    asked = [
        (f"what is the number of {plural(shape)} plus {more}?", str(count_of(scene.objects, {"shape": shape}) + more))
    ]
    if name:
        opposite = next(size for size in SIZES if size != scene.objects[index].size)
        asked.append((f"what is the opposite of the size of the {name}?", opposite))
    return [_vqa_entry(scene, n, *pair) for n, pair in enumerate(asked)]


def _aok_vqa(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    found = questions(scene, rng, 1, kinds=("colour", "shape"))
    if not found:
        return []
    others = [value for value in VALUES[found[0].kind] if value != found[0].answer]
    choices = [found[0].answer, *(others[int(i)] for i in rng.permutation(len(others))[:3])]
    order = [int(i) for i in rng.permutation(4)]
    seen = f"there is {article(full_name(pick(rng, scene.objects)))}."
    return [
        {
            "split": "train",
            "image_id": scene.number,
            "image": f"train2017/{scene.number:012d}.jpg",
            "question_id": f"{scene.number:022d}",
            "question": found[0].question,
            "choices": [choices[i] for i in order],
            "correct_choice_idx": order.index(0),
            "direct_answers": [found[0].answer] * _ANSWERS,
            "difficult_direct_answer": False,
            "rationales": [seen] * 3,
        }
    ]


def _gqa(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    return [
        {
            "image": f"{scene.number}.jpg",
            "question": found.question,
            "answer": found.answer,
            "question_id": f"{scene.number * 10 + index:08d}",
            "fullAnswer": found.answer,
        }
        for index, found in enumerate(questions(scene, rng, 2, kinds=_GQA_KINDS))
    ]


def _ocrvqa(scene: Scene, rng: np.random.Generator) -> list[Entry]:
    """There is nothing to read in a scene; its caption stands for the title."""
    title = captions.short_caption(scene, rng)
    found = questions(scene, rng, 2)
    return [
        {
            "key": str(scene.number),
            "imageURL": f"https://miniature.invalid/{scene.number}.jpg",
            "questions": ["what does the picture show?", *(q.question for q in found)],
            "answers": [title, *(q.answer for q in found)],
            "title": title,
            "genre": "picture",
            "authorName": "",
            "split": 1,
        }
    ]


DESCRIBE: dict[str, Describe] = {
    "laion": _web,
    "cc_sbu": _web,
    "cc_sbu_align": _align,
    "llava_conversation": _llava(lambda scene, rng: conversation(scene, rng).turns),
    "llava_detail": _llava(_detail),
    "llava_reason": _llava(lambda scene, rng: [reasoning(scene, rng)]),
    "multitask_conversation": _llava(multitask_conversation),
    "unnatural_instruction": _unnatural,
    "refcoco": _refs(REFERRING_KINDS, 0.3),
    "refcocop": _refs(("attribute",), 0.3),  # RefCOCO+ allows no words of location
    "refcocog": _refs(REFERRING_KINDS, 1.0),
    "refvg": _regions,
    "flickr_grounded_caption": _grounded,
    "flickr_CaptionToPhrase": _caption_to_phrase,
    "flickr_ObjectToPhrase": _object_to_phrase,
    "coco_caption": _coco_captions,
    "textcaps_caption": _textcaps,
    "coco_vqa": _vqa,
    "ok_vqa": _ok_vqa,
    "aok_vqa": _aok_vqa,
    "gqa": _gqa,
    "ocrvqa": _ocrvqa,
}
"""Data set name -> the entries of a scene."""
