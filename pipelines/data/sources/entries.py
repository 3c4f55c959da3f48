"""What an entry of each data set says: one function per file format, entry -> drafts of samples.

Text is cleaned where the release cleans it when it reads, so that rendering gives the release's strings. An entry that
lacks a field raises whatever Python raises; the reader turns that into a quarantine with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pipelines.data.sources.annotations import Draft
from pipelines.data.sources.base import Filtered, Malformed
from tinygptv.data.prompts import clean_caption
from tinygptv.data.sample import Turn


def basename(path: str) -> str:
    """File name of a path that an annotation gives."""
    return path.rsplit("/", 1)[-1]


def align(entry: Any, key: str) -> Iterator[Draft]:
    """cc_sbu_align: ``image_id``, ``caption``; the caption as it is."""
    yield Draft((Turn("", (text_of(entry, "caption"),)),), f"{entry['image_id']}.jpg")


def coco_caption(entry: Any, key: str) -> Iterator[Draft]:
    """COCO captions, Karpathy split: ``image``, ``caption``; entries on validation images are left out."""
    if "train" not in entry["image"]:
        raise Filtered("split", f"image {entry['image']} is not of the training split")
    yield Draft((Turn("", (clean_caption(text_of(entry, "caption")),)),), basename(entry["image"]))


def textcaps(entry: Any, key: str) -> Iterator[Draft]:
    """TextCaps: ``image_id``, ``caption_str``."""
    yield Draft((Turn("", (clean_caption(text_of(entry, "caption_str")),)),), f"{entry['image_id']}.jpg")


def vqa(answers: str, *, whole_path: bool = False) -> Callable[[Any, str], Iterator[Draft]]:
    """Questions with one answer or a list of them: ``image``, ``question`` and the field ``answers``.

    Args:
        answers: name of the field; an answer that is given twice is drawn twice as often.
        whole_path: the image's path counts, not its file name alone.
    """

    def describe(entry: Any, key: str) -> Iterator[Draft]:
        given = entry[answers]
        given = [given] if isinstance(given, str) else given
        cleaned = tuple(clean_caption(answer) for answer in given)
        image = entry["image"] if whole_path else basename(entry["image"])
        yield Draft((Turn(clean_caption(text_of(entry, "question")), cleaned),), image)

    return describe


def ocrvqa(entry: Any, key: str) -> Iterator[Draft]:
    """OCR-VQA: lists ``questions`` and ``answers``, ``imageURL``, ``split`` (1 trains); the key names the image."""
    extension = basename(entry["imageURL"])
    image = key + extension[extension.rindex(".") :] if "." in extension else key
    for question, answer in zip(entry["questions"], entry["answers"], strict=True):
        if entry["split"] != 1:
            raise Filtered("split", f"split {entry['split']} does not train")
        yield Draft((Turn(clean_caption(question), (clean_caption(answer),)),), image)


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
    yield Draft((Turn(clean_caption(instruction), (clean_caption(text_of(instance, "output")),)),))


def llava_image(entry: Any) -> str:
    """LLaVA's images are COCO's of 2014, by the entry's id."""
    return f"COCO_train2014_{entry['id']}.jpg"


def llava_single(entry: Any, key: str) -> Iterator[Draft]:
    """LLaVA detail and reasoning: the first question, cleaned, and its answer as it is."""
    turns = conversation_turns(entry["conversations"])
    yield Draft((Turn(clean_caption(turns[0].question), turns[0].answers),), llava_image(entry))


def llava_conversation(entry: Any, key: str) -> Iterator[Draft]:
    """LLaVA and multi-task conversations: every turn, not cleaned."""
    yield Draft(conversation_turns(entry["conversations"]), llava_image(entry))


def conversation_turns(conversations: Any) -> tuple[Turn, ...]:
    """Turns of ``[{"from": .., "value": ..}, ..]``: questions and answers take turns, whoever ``from`` names.

    The image's mark and line breaks go from the first question. A last question without an answer is left out: nothing
    could be learned from it.

    Raises:
        Malformed: there is no question with an answer.
    """
    texts = [text_of(message, "value") for message in conversations]
    if len(texts) < 2:
        raise Malformed("the conversation has no question with an answer")
    texts[0] = texts[0].replace("<image>", "").replace("\n", "").strip()
    return tuple(Turn(question, (answer,)) for question, answer in zip(texts[::2], texts[1::2], strict=False))


def text_of(entry: Any, name: str) -> str:
    """A field that must be text.

    Raises:
        Malformed: it is something else.
        KeyError: it is missing.
    """
    value = entry[name]
    if not isinstance(value, str):
        raise Malformed(f"{name} is no text but {type(value).__name__}")
    return value
