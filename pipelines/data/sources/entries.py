"""Entries of each data set: one function per file format, entry -> drafts of samples.

Text is cleaned where the release cleans it when it reads (``cleans_questions``, ``cleans_answers``), so that rendering
gives the release's strings. An entry that lacks a field raises whatever Python raises; the reader turns that into a
quarantine with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.data.sources.base import Filtered, Malformed, shorten
from pipelines.data.sources.conversations import Conversation, read_conversation
from pipelines.data.sources.drafts import Describe, Draft
from tinygptv.data.sample import Turn


def basename(path: str) -> str:
    """File name of a path that an annotation gives."""
    return path.rsplit("/", 1)[-1]


def align(entry: Any, key: str) -> Iterator[Draft]:
    """cc_sbu_align: ``image_id``, ``caption``; the caption as it is."""
    yield Draft((Turn("", (text_of(entry, "caption"),)),), f"{entry['image_id']}.jpg")


def coco_caption(entry: Any, key: str) -> Iterator[Draft]:
    """COCO captions: LAVIS's Karpathy list (``image``, ``caption``), or COCO's own annotations (``image_id``).

    Entries on validation images are left out, as in the release.
    """
    image = image_of(entry)
    if "image" in entry and "train" not in image:
        raise Filtered("split", f"image {shorten(image)} is not of the training split")
    yield Draft((Turn("", (text_of(entry, "caption"),)),), image, cleans_answers=True)


def textcaps(entry: Any, key: str) -> Iterator[Draft]:
    """TextCaps: ``image_id``, ``caption_str``."""
    yield Draft((Turn("", (text_of(entry, "caption_str"),)),), f"{entry['image_id']}.jpg", cleans_answers=True)


def vqa(answers: str) -> Describe:
    """Questions with one answer or a list of them: ``question``, the field ``answers``, and an image.

    The image is ``image`` as LAVIS writes it, ``image_id`` as COCO's publishers do (VQAv2, OK-VQA, A-OKVQA), or
    ``imageId`` as GQA does.

    Args:
        answers: name of the field; an answer that is given twice is drawn twice as often.
    """

    def describe(entry: Any, key: str) -> Iterator[Draft]:
        if "image" not in entry and entry.get("split", "train") != "train":
            raise Filtered("split", f"split {shorten(str(entry['split']))} does not train")
        image = image_of(entry)
        given = answers_of(entry, answers)
        turn = Turn(text_of(entry, "question"), given)
        yield Draft((turn,), image, cleans_questions=True, cleans_answers=True)

    return describe


def image_of(entry: Any) -> str:
    """The image that an entry names: LAVIS's ``image``, COCO's ``image_id`` or GQA's ``imageId``.

    Raises:
        Malformed: it is no name.
    """
    if "image" in entry:
        return text_of(entry, "image")
    if "imageId" in entry:
        return f"{entry['imageId']}.jpg"
    if not isinstance(entry.get("image_id"), int | str):
        raise Malformed("the entry names no image: it has no 'image', 'image_id' or 'imageId'")
    return f"{int(entry['image_id']):012d}.jpg"


def answers_of(entry: Any, name: str) -> tuple[str, ...]:
    """Answers of a question: a text, a list of texts, or a list of ``{"answer": ..}`` as VQA's publishers write them.

    ``direct_answers`` must be a list: the hub's copy of A-OKVQA has one written as text.

    Raises:
        Malformed: it is something else, or there is none.
    """
    if name not in entry:
        name = next((other for other in ("answers", "answer", "direct_answers") if other in entry), name)
    given = entry[name]
    if isinstance(given, str) and name != "direct_answers":
        return (given,)
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise Malformed(f"{name} is no list of answers")
    return tuple(text_of(answer, "answer") if isinstance(answer, Mapping) else _text(answer, name) for answer in given)


def ocrvqa(entry: Any, key: str) -> Iterator[Draft]:
    """OCR-VQA: lists ``questions`` and ``answers``, ``imageURL``, ``split`` (1 trains); the key names the image."""
    extension = basename(entry["imageURL"])
    image = key + extension[extension.rindex(".") :] if "." in extension else key
    for question, answer in zip(entry["questions"], entry["answers"], strict=True):
        if entry["split"] != 1:
            raise Filtered("split", f"split {entry['split']} does not train")
        turn = Turn(_text(question, "question"), (_text(answer, "answer"),))
        yield Draft((turn,), image, cleans_questions=True, cleans_answers=True)


def ocrvqa_names(name: str) -> tuple[str, ...]:
    """OCR-VQA's images by their own ending, or as ``.jpg``, which its download script makes of all of them."""
    stem = name.rpartition(".")[0] or name
    return tuple(dict.fromkeys([name, f"images/{name}", f"{stem}.jpg", f"images/{stem}.jpg"]))


def grounded_caption(entry: Any, key: str) -> Iterator[Draft]:
    """Flickr30k Entities: ``image_id``, ``grounded_caption`` with its boxes written out."""
    yield Draft((Turn("", (text_of(entry, "grounded_caption"),)),), f"{entry['image_id']}.jpg")


def caption_to_phrase(entry: Any, key: str) -> Iterator[Draft]:
    """The same, ``caption`` -> ``output``."""
    yield Draft((Turn(text_of(entry, "caption"), (text_of(entry, "output"),)),), f"{entry['image_id']}.jpg")


def object_to_phrase(entry: Any, key: str) -> Iterator[Draft]:
    """The same, ``phrase`` -> the phrase with its ``bbox``, which is box text already."""
    phrase = text_of(entry, "phrase")
    answer = f"<p>{phrase}</p> {text_of(entry, 'bbox')}"
    yield Draft((Turn(phrase, (answer,)),), f"{entry['image_id']}.jpg")


def unnatural(entry: Any, key: str) -> Iterator[Draft]:
    """Unnatural Instructions: the first of ``instances``; text only."""
    instance = entry["instances"][0]
    instruction = text_of(instance, "instruction_with_input")
    if instance["constraints"] is not None:
        instruction = f"{instruction} {text_of(instance, 'constraints')}"
    turn = Turn(instruction, (text_of(instance, "output"),))
    yield Draft((turn,), cleans_questions=True, cleans_answers=True)


def llava_image(entry: Any) -> str:
    """LLaVA's images are COCO's of 2014, by the entry's id; its later mixtures have images of other data sets, too."""
    given = entry.get("image")
    return given if isinstance(given, str) and given else f"COCO_train2014_{entry['id']}.jpg"


def llava_single(entry: Any, key: str) -> Iterator[Draft]:
    """LLaVA detail and reasoning: the first question, cleaned, and its answer as it is."""
    conversation = _llava_conversation(entry)
    yield Draft(conversation.turns[:1], llava_image(entry), cleans_questions=True, changes=conversation.changes)


def llava_conversation(entry: Any, key: str) -> Iterator[Draft]:
    """LLaVA and multi-task conversations: every turn, not cleaned."""
    conversation = _llava_conversation(entry)
    yield Draft(conversation.turns, llava_image(entry), changes=conversation.changes)


def _llava_conversation(entry: Any) -> Conversation:
    """A conversation about one image, as the release reads it: the mark of the image and all line breaks go from the
    first question, later ones stay as they are."""
    conversation = read_conversation(entry["conversations"], takes_marks=False)
    first, *rest = conversation.turns
    first = Turn(first.question.replace("<image>", "").replace("\n", "").strip(), first.answers)
    return Conversation((first, *rest), 1, conversation.changes)


def text_of(entry: Any, name: str) -> str:
    """A field that must be text.

    Raises:
        Malformed: it is missing, or something else.
    """
    if not isinstance(entry, Mapping):
        raise Malformed(f"what should have {name!r} is no object but {type(entry).__name__}")
    if name not in entry:
        raise Malformed(f"the entry has {_names(entry) or 'no fields'}, but no {name!r}")
    return _text(entry[name], name)


def _names(entry: Mapping[Any, Any]) -> str:
    return shorten(", ".join(repr(key) for key in entry))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Malformed(f"{name} is no text but {type(value).__name__}")
    return value
